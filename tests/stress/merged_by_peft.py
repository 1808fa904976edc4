"""Adapts ESM-2 models with peft, merges with peft's own `merge_and_unload` and with the model step, and compares.

peft is no dependency of the project: it is put beside the newest transformers, which saved_by_transformers.py installs
(a minute, 400 MB, from PyPI), and kept.

    python tests/stress/merged_by_peft.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import saved_by_transformers
import torch

PROJECT = Path(__file__).resolve().parents[2]
TRANSFORMERS = saved_by_transformers.FOLDERS / "newest"
FOLDER = saved_by_transformers.FOLDERS / "peft"
TOLERANCE = 1e-6
LINEAR = ["query", "key", "value", "dense"]
CASES = {
    "query and value": {"target_modules": ["query", "value"]},
    "every matrix": {"target_modules": LINEAR, "lora_alpha": 32},
    "rank stabilised": {"target_modules": LINEAR, "use_rslora": True},
    "fan_in_fan_out": {"target_modules": LINEAR, "fan_in_fan_out": True},
    "patterns": {"target_modules": LINEAR, "rank_pattern": {"mediate.dense": 2}, "alpha_pattern": {"output.dense": 5}},
    "all biases": {"target_modules": ["query"], "bias": "all"},
    "its own biases": {"target_modules": ["query"], "bias": "lora_only"},
    "bias of B": {"target_modules": ["query"], "lora_bias": True},
    "a norm trained whole": {"target_modules": ["key"], "modules_to_save": ["emb_layer_norm_after"]},
    "embedding": {"target_modules": ["word_embeddings", "query"]},
    "gaussian start": {"target_modules": LINEAR, "init_lora_weights": "gaussian"},
    "orthogonal start": {"target_modules": LINEAR, "init_lora_weights": "orthogonal"},
}  # fmt: skip
CLASSES = ("EsmModel", "EsmForMaskedLM", "EsmForSequenceClassification", "EsmcForMaskedLM")
# What ESM C's modules are called instead; it has no biases that it could train.
OF_ESM_C = {
    "query": ["q_proj"], "key": ["k_proj"], "value": ["v_proj"],
    "dense": ["o_proj", "gate_proj", "up_proj", "down_proj"],
    "word_embeddings": ["embed_tokens"], "emb_layer_norm_after": ["esmc.norm"],
}  # fmt: skip


def esm_config() -> Any:
    """Of a small ESM-2."""
    import transformers

    return transformers.EsmConfig(
        vocab_size=33, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
        position_embedding_type="rotary", token_dropout=True, emb_layer_norm_before=False, layer_norm_eps=1e-5,
        mask_token_id=32, pad_token_id=1, max_position_embeddings=1026,
    )  # fmt: skip


def largest_difference(name: str, settings: dict, dtype: torch.dtype, folder: Path) -> float:
    """Between the tensors of both, relative to the largest of peft's."""
    import peft
    import transformers
    from safetensors.torch import load_file

    from esmflow.checkpoint.convert import convert_checkpoint

    torch.manual_seed(0)
    if name.startswith("Esmc"):
        config = transformers.EsmcConfig(
            hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
            head_dim=16,
        )  # fmt: skip
        named = {key: settings[key] for key in ("target_modules", "modules_to_save") if key in settings}
        settings = settings | {key: [new for old in names for new in OF_ESM_C[old]] for key, names in named.items()}
    else:
        config = esm_config()
    kind = getattr(transformers, name)
    kind(config).to(dtype).save_pretrained(folder / "base")
    adapted = peft.get_peft_model(kind.from_pretrained(folder / "base", dtype=dtype), peft.LoraConfig(r=4, **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "adapter")
    base = kind.from_pretrained(folder / "base", dtype=dtype)
    peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(folder / "merged")
    convert_checkpoint(folder / "merged", folder / "theirs.safetensors", "theirs")
    info = convert_checkpoint(folder / "adapter", folder / "ours.safetensors", "ours", folder / "base")
    # transformers keeps rotary frequencies in fp32, whatever the model is in.
    theirs, ours = (
        {key: tensor for key, tensor in load_file(folder / f"{whose}.safetensors").items() if "inv_freq" not in key}
        for whose in ("theirs", "ours")
    )
    assert {key: tensor.dtype for key, tensor in theirs.items()} == {key: tensor.dtype for key, tensor in ours.items()}
    assert convert_checkpoint(folder / "base", folder / "plain.safetensors", "plain").digest != info.digest
    pairs = [(ours[key].double(), tensor.double()) for key, tensor in theirs.items()]
    return max(float((our - their).abs().max() / their.abs().max().clamp(min=1)) for our, their in pairs)


def compare_all() -> None:
    """One line for each case."""
    import peft
    import transformers

    print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    bad = 0
    for case, settings in CASES.items():
        for name in CLASSES[:3] if "bias" in case else CLASSES:
            for dtype, tolerance in ((torch.float32, TOLERANCE), (torch.float16, 2e-3)):
                with tempfile.TemporaryDirectory() as folder:
                    difference = largest_difference(name, settings, dtype, Path(folder))
                bad += not difference <= tolerance
                print(f"{case:22} {name:30} {dtype!s:15} {difference:.1e}")
    if bad:
        sys.exit(f"{bad} of them differ")


def main() -> None:
    if not saved_by_transformers.is_installed("newest"):
        saved_by_transformers.install("newest")
    if not (FOLDER / "complete").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", FOLDER]
        subprocess.run([*pip, "peft", "accelerate"], check=True)
        (FOLDER / "complete").touch()
    path = os.pathsep.join(map(str, (PROJECT / "workflow" / "scripts", Path(__file__).parent)))
    script = (
        f"import sys; sys.path += {[str(TRANSFORMERS), str(FOLDER)]!r}; import merged_by_peft as m; m.compare_all()"
    )
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    sys.exit(subprocess.run([sys.executable, "-c", script], env=environment).returncode)


if __name__ == "__main__":
    main()
