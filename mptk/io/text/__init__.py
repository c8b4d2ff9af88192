"""text: where text comes from, one file a kind of source, and how it becomes windows of tokens. ``io/data.py`` uses it.

A document is an iterable of pieces of one text, so that no text need be in memory as a whole.
"""
