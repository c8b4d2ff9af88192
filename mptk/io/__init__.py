"""io: models, text and folders: what is read from and written to disk."""
