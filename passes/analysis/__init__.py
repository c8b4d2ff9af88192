"""analysis: the meaning of a program's axes, the coupled channels, and the memory that values share."""
