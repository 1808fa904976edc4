"""The certificate: a sample computed again with fair-esm's model, and the manifest held against the store."""
