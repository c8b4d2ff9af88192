"""Folders that are published: whole, with a manifest, a licence and a card."""
