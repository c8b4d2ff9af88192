"""methods: everything that chooses what is cut, and what is done to the weights that stay."""
