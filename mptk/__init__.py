"""mptk: compiler-style structured pruning for language models."""
