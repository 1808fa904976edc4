"""The models themselves: packs of sequences to arrays, on a GPU or a CPU. The only room that imports torch freely."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esmflow.arrays import Outputs
    from esmflow.engine.engine import Engine


def load_engine(name: str, checkpoint: str, outputs: Outputs, precision: str, device: str) -> Engine:
    """Loads a converted checkpoint into the engine of this name, on `device`. Imports torch."""
    if name == "packed":
        from esmflow.engine.packed import PackedEngine

        return PackedEngine.load(checkpoint, outputs, precision, device)
    from esmflow.engine.fair_esm import ReferenceEngine

    return ReferenceEngine.load(checkpoint, outputs, precision, device)
