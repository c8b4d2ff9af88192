"""What must be equal, and what a folder claims of itself."""
