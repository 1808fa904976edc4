"""Output formats: one small module each, behind one interface. `esmflow.formats` lists them."""

from __future__ import annotations

from esmflow.writers.base import Batch, Description, EmbeddingWriter

__all__ = ["Batch", "Description", "EmbeddingWriter"]
