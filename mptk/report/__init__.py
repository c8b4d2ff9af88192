"""A report on the terminal, in the model card, and as a page."""
