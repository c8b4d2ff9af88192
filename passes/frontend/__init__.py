"""frontend: from a module to a Program."""
