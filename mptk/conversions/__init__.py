"""What changes a dense model before it is analysed: a vocabulary without tokens, merged KV heads."""
