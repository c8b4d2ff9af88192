"""cost: the cost of a model at given widths, in parameters, flops, bytes or predicted milliseconds."""
