"""Saves ESM-2 models with a transformers of your choice, converts them, and compares with transformers' own output.

transformers is no dependency of this project: install the version to try into a folder of its own and name that folder.

    python -m pip install --target /tmp/transformers transformers
    python tests/stress/saved_by_transformers.py /tmp/transformers
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

PROJECT = Path(__file__).resolve().parents[2]
CLASSES = ("EsmModel", "EsmForMaskedLM", "EsmForSequenceClassification", "EsmForTokenClassification")
SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "MVLSPADKTNVKAAW", "ACDEFGHIKLMNPQRSTVWYBXUZO"]
# Of vectors in fp32; weights that were rounded to 16 bits are the same on both sides.
TOLERANCE = 1e-4


def compare(name: str, dtype: torch.dtype, shard_size: str, folder: Path) -> tuple[float, str]:
    """The largest relative error of a mean, and where the rotary frequencies were found."""
    import transformers

    from esmflow.arrays import Outputs
    from esmflow.checkpoint.convert import convert_checkpoint
    from esmflow.engine.packed import PackedEngine

    torch.manual_seed(0)
    config = transformers.EsmConfig(
        vocab_size=33, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
        position_embedding_type="rotary", token_dropout=True, emb_layer_norm_before=False, layer_norm_eps=1e-5,
        mask_token_id=32, pad_token_id=1, max_position_embeddings=1026,
    )  # fmt: skip
    model = getattr(transformers, name)(config).to(dtype).eval()
    model.save_pretrained(folder / "saved", max_shard_size=shard_size)
    info = convert_checkpoint(folder / "saved", folder / "converted.safetensors", name)
    engine = PackedEngine.load(folder / "converted.safetensors", Outputs((3,), ("mean",)), "fp32", "cpu")
    found = engine.fetch(engine.launch(engine.prepare(SEQUENCES)))["mean_layer3"]
    # Loaded anew in fp32, as a user would who embeds with transformers.
    encoder = transformers.EsmModel.from_pretrained(folder / "saved").float().eval()
    letters = "LAGVSERTIDPKQNFYMHWCXBUZO"
    errors = []
    for sequence, mean in zip(SEQUENCES, found, strict=True):
        tokens = torch.tensor([[0, *(4 + letters.index(letter) for letter in sequence), 2]])
        with torch.no_grad():
            hidden = encoder(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        expected = hidden[0, 1:-1].mean(0).numpy()
        errors.append(float(np.linalg.norm(mean - expected) / np.linalg.norm(expected)))
    return max(errors), info.frequencies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("transformers", help="the folder that transformers was installed into")
    arguments = parser.parse_args()
    sys.path[:0] = [str(PROJECT / "workflow" / "scripts")]
    sys.path.append(arguments.transformers)
    import transformers

    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    bad = 0
    for name in CLASSES:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for shard_size in ("5GB", "100KB"):
                with tempfile.TemporaryDirectory() as folder:
                    error, frequencies = compare(name, dtype, shard_size, Path(folder))
                bad += error > TOLERANCE
                print(f"{name:32} {dtype!s:15} {shard_size:6} {error:.1e}  frequencies {frequencies}")
    if bad:
        sys.exit(f"{bad} of them differ by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
