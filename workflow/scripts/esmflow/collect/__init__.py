"""Collecting: records joined to segments, written as manifest, failures and output formats."""
