"""Compiler passes of mptk: one pass a file."""
