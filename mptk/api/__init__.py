"""The Python API: prune, recover, evaluate, generate, export, shapes, rerun, and their results."""
