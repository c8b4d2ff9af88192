"""text: what ``--data`` names (sources), the text in files and tables (files), the text that a model writes (sampled),
and how text becomes windows of tokens (tokens). ``io/data.py`` uses them.

A document is an iterable of pieces of one text, so that no text need be in memory as a whole.
"""
