"""Saves models of every family with transformers, converts them, and compares with that transformers' own output.

transformers is no dependency of the project: the newest one and the oldest that installs are put into folders of their
own (a minute, 400 MB, from PyPI) and kept.

    python tests/stress/saved_by_transformers.py            compares
    python tests/stress/saved_by_transformers.py --golden   writes tests/data/golden_esm_c.npz, with the newest
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

PROJECT = Path(__file__).resolve().parents[2]
GOLDEN = PROJECT / "tests" / "data" / "golden_esm_c.npz"
FOLDERS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "esmflow" / "transformers"
PACKAGES = {"newest": "transformers", "oldest": "transformers==4.40.2"}
CLASSES = ("EsmModel", "EsmForMaskedLM", "EsmForSequenceClassification", "EsmForTokenClassification")
# In one file, and in several.
LAYOUTS = ((torch.float32, "5GB"), (torch.float16, "5GB"), (torch.bfloat16, "5GB"), (torch.float32, "200KB"))
SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "MVLSPADKTNVKAAW", "ACDEFGHIKLMNPQRSTVWYBXUZO"]
# Of vectors in fp32; weights that were rounded to 16 bits are the same on both sides.
TOLERANCE = 1e-4
# Of every number of ESM C, in fp32, as a part of the largest.
ESM_C_TOLERANCE = 1e-5
LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO"


def tokens_of(sequence: str) -> torch.Tensor:
    """`[1, n + 2]`."""
    return torch.tensor([[0, *(4 + LETTERS.index(letter) for letter in sequence), 2]])


@torch.no_grad()
def esm_c_results(folder: Path, sequences: list[str]) -> dict[str, np.ndarray]:
    """What transformers' `EsmcForMaskedLM` gives for each sequence alone, as an engine names and lays it out."""
    import transformers

    # Others than eager attention have no maps to show.
    model = transformers.EsmcForMaskedLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    parts: dict[str, list[np.ndarray]] = {}
    for sequence in sequences:
        result = model(tokens_of(sequence), output_hidden_states=True, output_attentions=True)
        for layer, maps in enumerate(result.attentions, start=1):
            rows = maps[0].permute(1, 2, 0).flatten(0, 1).numpy()
            parts.setdefault(f"attention_layer{layer}", []).append(rows)
        for layer, values in enumerate(result.hidden_states):
            rows = values[0].numpy()
            parts.setdefault(f"mean_layer{layer}", []).append(rows[None, 1:-1].mean(1))
            parts.setdefault(f"bos_layer{layer}", []).append(rows[:1])
            parts.setdefault(f"per_residue_layer{layer}", []).append(rows[1:-1])
        # Beyond the tokens that there are the head has rows that stand for none.
        parts.setdefault("logits", []).append(result.logits[0, 1:-1, :33].numpy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def compare_esm_c(shape: tuple[int, int, int, int], folder: Path) -> dict[str, float]:
    """By kind of output, the largest difference in any layer, as a part of the largest number."""
    from made_up_families import random_esm_c, write_esm_c

    from esmflow.arrays import Array, Outputs
    from esmflow.checkpoint.convert import convert_checkpoint
    from esmflow.engine.packed import PackedEngine

    saved = write_esm_c(folder / "saved", random_esm_c(*shape), shape[2])
    info = convert_checkpoint(saved, folder / "converted.safetensors", "ESM C")
    _check_classes(saved, folder, info.digest)
    outputs = Outputs(tuple(range(shape[0] + 1)), ("mean", "bos", "per_residue", "attention", "logits"))
    engine = PackedEngine.load(folder / "converted.safetensors", outputs, "fp32", "cpu")
    found = engine.fetch(engine.launch(engine.prepare(SEQUENCES)))
    errors: dict[str, float] = {}
    for name, expected in esm_c_results(saved, SEQUENCES).items():
        error = float(np.abs(found[name] - expected).max() / np.abs(expected).max())
        errors[Array.named(name).kind] = max(error, errors.get(Array.named(name).kind, 0.0))
    return errors


def _check_classes(saved: Path, folder: Path, digest: str) -> None:
    """What transformers itself saves of ESM C, of every class and in several files, is the same model."""
    import transformers

    from esmflow.checkpoint.convert import convert_checkpoint

    encoders = set()
    for name in ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"):
        model = getattr(transformers, f"Esmc{name}").from_pretrained(saved)
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype).save_pretrained(folder / name, max_shard_size="100KB")
            found = convert_checkpoint(folder / name, folder / f"{name}.safetensors", name)
            if name != "ForMaskedLM":
                encoders.add(found.digest)
            elif dtype == torch.float32:
                assert found.digest == digest, "saved again it is another model"
            shutil.rmtree(folder / name)
    assert len(encoders) == 2, "its encoders differ"


def compare_learned_positions(norm_before: bool, folder: Path) -> float:
    """ESM-1b and ESM-1v as transformers saves them: the largest relative error of means, or of logits."""
    import transformers

    from esmflow.arrays import Outputs
    from esmflow.checkpoint.convert import convert_checkpoint
    from esmflow.engine.packed import PackedEngine

    torch.manual_seed(0)
    config = transformers.EsmConfig(
        vocab_size=33, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
        position_embedding_type="absolute", token_dropout=True, emb_layer_norm_before=norm_before,
        layer_norm_eps=1e-5, mask_token_id=32, pad_token_id=1, max_position_embeddings=1026,
    )  # fmt: skip
    model = transformers.EsmForMaskedLM(config).eval()
    model.save_pretrained(folder / "saved")
    info = convert_checkpoint(folder / "saved", folder / "converted.safetensors", "x")
    assert info.dimensions.family_name == ("ESM-1b" if norm_before else "ESM-1v")
    engine = PackedEngine.load(folder / "converted.safetensors", Outputs((3,), ("mean", "logits")), "fp32", "cpu")
    found = engine.fetch(engine.launch(engine.prepare(SEQUENCES)))
    means, logits = [], []
    for sequence in SEQUENCES:
        tokens = tokens_of(sequence)
        with torch.no_grad():
            result = model(tokens, attention_mask=torch.ones_like(tokens), output_hidden_states=True)
        means.append(result.hidden_states[-1][0, 1:-1].mean(0)[None].numpy())
        logits.append(result.logits[0, 1:-1].numpy())
    pairs = ((found["mean_layer3"], np.concatenate(means)), (found["logits"], np.concatenate(logits)))
    return max(float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)) for ours, theirs in pairs)


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
    errors = []
    for sequence, mean in zip(SEQUENCES, found, strict=True):
        tokens = tokens_of(sequence)
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
    for norm_before in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            error = compare_learned_positions(norm_before, Path(folder))
        bad += error > TOLERANCE
        print(f"{'ESM-1b' if norm_before else 'ESM-1v':32} {error:.1e}  learned positions")
    if hasattr(transformers, "EsmcModel"):
        from made_up_families import ESM_C_SHAPES

        for name, shape in ESM_C_SHAPES.items():
            with tempfile.TemporaryDirectory() as folder:
                errors = compare_esm_c(shape, Path(folder))
            bad += max(errors.values()) > ESM_C_TOLERANCE
            print(f"ESM C, {name:25} " + "  ".join(f"{kind} {error:.1e}" for kind, error in errors.items()))
    if bad:
        sys.exit(f"{bad} of them differ by more than {TOLERANCE}, or of ESM C by more than {ESM_C_TOLERANCE}")


def write_golden() -> None:
    """What transformers gives for ESM C's shapes, so that tests hold ESM C without it."""
    from made_up_families import ESM_C_SHAPES, random_esm_c, write_esm_c

    arrays: dict[str, np.ndarray] = {"sequences": np.array(SEQUENCES)}
    for name, shape in ESM_C_SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            saved = write_esm_c(Path(folder), random_esm_c(*shape), shape[2])
            found = esm_c_results(saved, SEQUENCES)
            arrays |= {f"{name}/{array}": v for array, v in found.items() if not array.startswith("attention")}
    np.savez_compressed(GOLDEN, **arrays)


def is_installed(which: str) -> bool:
    """Whether the newest or the oldest transformers is there."""
    return (FOLDERS / which / "complete").exists()


def install(which: str) -> None:
    """Puts it where it belongs."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-warn-conflicts"]
    subprocess.run([*pip, "--target", FOLDERS / which, PACKAGES[which]], check=True)
    (FOLDERS / which / "complete").touch()


def run(which: str, function: str = "compare_all") -> subprocess.CompletedProcess[str]:
    """Calls a function with one transformers, in a process of its own, whose packages come after the project's own."""
    folders = PROJECT / "workflow" / "scripts", PROJECT / "tests" / "support", Path(__file__).parent
    path = os.pathsep.join(map(str, folders))
    script = f"import sys; sys.path.append({str(FOLDERS / which)!r}); import saved_by_transformers as s; s.{function}()"
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


def main() -> None:
    failed = False
    golden = "--golden" in sys.argv
    for which in ("newest",) if golden else PACKAGES:
        if not is_installed(which):
            install(which)
        result = run(which, "write_golden" if golden else "compare_all")
        print(result.stdout, result.stderr if result.returncode else "", sep="\n")
        failed |= result.returncode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
