"""From a model to its program, from a plan to the cut program."""
