"""What a report says: on the terminal, in the model card, as a page."""
