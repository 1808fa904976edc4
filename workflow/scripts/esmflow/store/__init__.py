"""Embeddings on disk: immutable segments by fingerprint, found by the digests of sequences."""
