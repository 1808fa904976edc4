"""The report's figures. Each is described once, with Altair; the page and Snakemake's own report show the same drawing.

Every figure is a function of what it shows and of the width that it is drawn for, in pixels: a screen's or a phone's.
Colours are the page's by name, and what a mark says when it is pointed at is its description.
"""
