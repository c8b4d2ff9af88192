"""targets: legal widths, and the forms in which a cut model is written."""
