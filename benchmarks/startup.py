"""What a new process does until it can work: `startup.py packed|fair-esm CHECKPOINT DEVICE`. Timed from outside."""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "workflow" / "scripts")]


def packed(checkpoint: str, device: str) -> None:
    """Loads the packed engine and embeds one pack of 16 thousand tokens."""
    from esmflow.arrays import Outputs
    from esmflow.checkpoint.file import read_checkpoint_info
    from esmflow.engine.packed import PackedEngine

    last = read_checkpoint_info(checkpoint).dimensions.layers
    engine = PackedEngine.load(checkpoint, Outputs((last,), ("mean",)), "auto", device)
    pack = ["MKVL" * 64] * (64 if device == "cuda" else 2)
    engine.fetch(engine.launch(engine.prepare(pack)))


def fair_esm(checkpoint: str, device: str) -> None:
    """Loads the same weights with fair-esm's own loader and moves the model to the device."""
    import esm
    import torch

    with torch.serialization.safe_globals([argparse.Namespace]):
        model, _ = esm.pretrained.load_model_and_alphabet_local(checkpoint)
    model.eval().to(device)


if __name__ == "__main__":
    {"packed": packed, "fair-esm": fair_esm}[sys.argv[1]](*sys.argv[2:])
