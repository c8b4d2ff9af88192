"""Settings: their fields, bounds and keywords, and the recipe that holds them."""
