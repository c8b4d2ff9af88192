"""page: one HTML page, without network or scripts, that shows pruned folders or the coupling of a model's layer."""
