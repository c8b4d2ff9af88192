"""The Python API: prune, recover, evaluate, generate, export, shapes, and their results."""
