"""maskprune: learn masks and the layers' common widths together (MaskPrune, arXiv 2502.14008). docs/maskprune.md."""
