"""The engines by name: what each may compute and how it computes, told without torch; and loading one."""

from __future__ import annotations

from esmflow.engine import Engine, Outputs

ARITHMETIC = {
    "packed": "packs without padding; rotary positions in fp32; GELU by tanh in bf16 and fp16 on a GPU, else by erf; "
    "auto is fp16",
    "reference": "fair-esm 2.0.0 on padded batches, under autocast in bf16 and fp16; rotary positions in fp32; "
    "auto is bf16",
}
"""How each engine computes, in words: part of the fingerprint, so a change of method is a change of fingerprint."""


def load_engine(
    name: str, checkpoint: str, outputs: Outputs, precision: str, device: str, per_residue: str = "fp32"
) -> Engine:
    """Loads a converted checkpoint into the engine of this name, on `device`. Imports torch.

    per_residue: `fp32` or `fp16`, the type of per-residue arrays.
    """
    if name == "packed":
        from esmflow.model import PackedEngine

        return PackedEngine.load(checkpoint, outputs, precision, device, per_residue=per_residue)
    from esmflow.reference import ReferenceEngine

    return ReferenceEngine.load(checkpoint, outputs, precision, device, per_residue=per_residue)
