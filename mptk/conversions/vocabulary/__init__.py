"""Which tokens a text uses; tokenizers, configs and models without the others."""
