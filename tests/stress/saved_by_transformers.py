"""Saves ESM-2 models with transformers, converts them, and compares with that transformers' own output.

transformers is no dependency of the project: the newest one and the oldest that installs are put into folders of their
own (a minute, 400 MB, from PyPI) and kept.

    python tests/stress/saved_by_transformers.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

PROJECT = Path(__file__).resolve().parents[2]
FOLDERS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "esmflow" / "transformers"
PACKAGES = {"newest": "transformers", "oldest": "transformers==4.40.2"}
CLASSES = ("EsmModel", "EsmForMaskedLM", "EsmForSequenceClassification", "EsmForTokenClassification")
# In one file, and in several.
LAYOUTS = ((torch.float32, "5GB"), (torch.float16, "5GB"), (torch.bfloat16, "5GB"), (torch.float32, "200KB"))
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


def compare_all() -> None:
    """With the transformers that is imported; one line for each layout."""
    import transformers

    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    bad = 0
    for name in CLASSES:
        for dtype, shard_size in LAYOUTS:
            with tempfile.TemporaryDirectory() as folder:
                error, frequencies = compare(name, dtype, shard_size, Path(folder))
            bad += error > TOLERANCE
            print(f"{name:32} {dtype!s:15} {shard_size:6} {error:.1e}  frequencies {frequencies}")
    if bad:
        sys.exit(f"{bad} of them differ by more than {TOLERANCE}")


def is_installed(which: str) -> bool:
    """Whether the newest or the oldest transformers is there."""
    return (FOLDERS / which / "complete").exists()


def install(which: str) -> None:
    """Puts it where it belongs."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-warn-conflicts"]
    subprocess.run([*pip, "--target", FOLDERS / which, PACKAGES[which]], check=True)
    (FOLDERS / which / "complete").touch()


def run(which: str) -> subprocess.CompletedProcess[str]:
    """Compares with one transformers, in a process of its own. The project's own packages go before those beside it."""
    path = os.pathsep.join(map(str, (PROJECT / "workflow" / "scripts", Path(__file__).parent)))
    script = (
        f"import sys; sys.path.append({str(FOLDERS / which)!r}); import saved_by_transformers as s; s.compare_all()"
    )
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


def main() -> None:
    failed = False
    for which in PACKAGES:
        if not is_installed(which):
            install(which)
        result = run(which)
        print(result.stdout, result.stderr if result.returncode else "", sep="\n")
        failed |= result.returncode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
