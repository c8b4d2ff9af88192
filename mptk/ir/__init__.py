"""ir: the data types of the compiler: programs, axes, families, plans and the pass protocol."""
