"""Output formats: one small module each, behind one interface.

A format is registered here by its name in the configuration's `formats`.
"""

from __future__ import annotations

from esmflow.writers.base import Description, EmbeddingWriter
from esmflow.writers.h5 import H5Writer
from esmflow.writers.pt import PtWriter

FORMATS: dict[str, type[EmbeddingWriter]] = {"h5": H5Writer, "pt": PtWriter}

__all__ = ["FORMATS", "Description", "EmbeddingWriter", "H5Writer", "PtWriter"]
