"""Variant effects: the table of substitutions, which records they are of, and the masked copies that score them."""
