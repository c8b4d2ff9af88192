"""The compiler of mptk: from a module to a program, its analysis, the passes that cut it, and their pipelines."""
