"""transforms: from a Program to a Program, or masks in a module."""
