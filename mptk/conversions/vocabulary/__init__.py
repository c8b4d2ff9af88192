"""Vocabulary trimming: find the tokens that a text uses; remove the others from tokenizer, config and model."""
