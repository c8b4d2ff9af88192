"""An mptk plugin: each module is found through an entry point in pyproject.toml."""
