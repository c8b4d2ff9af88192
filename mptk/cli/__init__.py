"""cli: the command line, its options, progress bars, tables and plots."""
