"""The engines by name: what each may compute and how it computes, told without torch; and loading one."""

from __future__ import annotations

from esmflow.arrays import Outputs
from esmflow.engine.engine import Engine


def load_engine(
    name: str, checkpoint: str, outputs: Outputs, precision: str, device: str, per_residue: str = "fp32"
) -> Engine:
    """Loads a converted checkpoint into the engine of this name, on `device`. Imports torch.

    per_residue: `fp32` or `fp16`, the type of per-residue arrays.
    """
    if name == "packed":
        from esmflow.engine.packed import PackedEngine

        return PackedEngine.load(checkpoint, outputs, precision, device, per_residue=per_residue)
    from esmflow.engine.fair_esm import ReferenceEngine

    return ReferenceEngine.load(checkpoint, outputs, precision, device, per_residue=per_residue)
