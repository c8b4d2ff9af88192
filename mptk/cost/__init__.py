"""cost: what a model costs at given widths, in parameters, flops, bytes or measured milliseconds."""
