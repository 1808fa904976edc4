"""The certificate: a sample computed again with fair-esm's model, and the manifest held against the store."""

LONGEST = 4000
"""fair-esm's attention maps grow with the square of the length: longer sequences are not computed again."""

RESIDENT_BYTES = 4 << 30
"""A model of more bytes in fp32 keeps a layer in memory only while it computes: at 15B that is 1.3 GB of 60."""

TOKENS_BY_LAYER = 8192
"""Padded tokens of a batch where each batch reads all weights anew."""

CONTACT_MAP_BYTES = 4 << 30
"""fair-esm keeps the attention maps of all layers, more than once, to predict contacts: larger ones are left out."""
