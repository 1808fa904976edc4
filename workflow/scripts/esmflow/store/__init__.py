"""Embeddings on disk: immutable segments by fingerprint, found by the digests of sequences."""

SEGMENT_SUFFIX = ".safetensors"
"""Of the files of segments: named here, where a dry run finds it without loading what reads them."""
