"""stock: the transformers config that holds a cut model, and its checkpoint folder."""
