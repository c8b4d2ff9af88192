"""driver: a whole run, from a model's name to a proven folder, as a chain of values."""
