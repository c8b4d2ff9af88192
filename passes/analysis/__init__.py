"""analysis: what the axes of a program mean, which channels are coupled, and where values live."""
