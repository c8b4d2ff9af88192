"""Settings: their declarations, their checks, and the recipe that stores them."""
