"""Trace a model to its program, and cut the program to a plan."""
