"""Commands that are killed, at random moments and at each rename, and what the next run makes of it."""
