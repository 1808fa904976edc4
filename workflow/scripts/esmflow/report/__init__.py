"""The report of a run, and the lines that it ends with."""
