"""vocabulary: which tokens a text uses, and tokenizers, configs and embeddings without the others."""
