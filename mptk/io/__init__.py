"""io: read and write models, text and folders."""
