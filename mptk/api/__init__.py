"""The Python API: prune, recover, evaluate, generate, export, shapes, rerun; what they give."""
