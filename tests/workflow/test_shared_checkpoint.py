"""One conversion of a checkpoint for a whole site, by Snakemake's own cache between workflows.

The checkpoint is an adapter that is merged into its base, and what is taken from it are attention maps: one run shows
all of it.
"""

import json

import numpy as np
import torch
from made_up import random_model, stored_tensors, write_fair_esm
from safetensors.torch import save_file

QUERY = "base_model.model.esm.encoder.layer.0.attention.self.query"


def test_a_second_run_in_another_folder_takes_the_converted_checkpoint_from_the_site_s_cache(tmp_path, quick_run):
    write_fair_esm(tmp_path / "base.pt", stored_tensors(random_model(2, 32, 2)))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "lora_alpha": 8, "base_model_name_or_path": "../base.pt"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    update = {f"{QUERY}.lora_A.weight": torch.ones(4, 32), f"{QUERY}.lora_B.weight": torch.ones(32, 4)}
    save_file(update, adapter / "adapter_model.safetensors")
    (tmp_path / "cache").mkdir()
    environment = {"SNAKEMAKE_OUTPUT_CACHE": str(tmp_path / "cache")}
    first, second = (quick_run(3, folder=name, model=str(adapter), groups=1) for name in ("first", "second"))

    first.succeed("--cache", "--until", "model", environment=environment)
    # What a run takes of a checkpoint is not in it: other layers and kinds share it.
    second.configure(layers=[1], include=["bos", "attention"], formats=["npz"], max_residues=100, verify={"sample": 3})
    second.succeed("--cache", environment=environment)
    assert "base.pt" in (first.folder / "logs" / "model.log").read_text()
    assert (second.folder / "logs" / "model.log").read_text() == ""
    converted = [(run.results / "model" / "checkpoint.safetensors").resolve() for run in (first, second)]
    assert converted[0] == converted[1]
    assert converted[0].is_relative_to(tmp_path / "cache")

    assert json.loads((second.results / "model" / "model.json").read_text())["base"] == "base"
    archives = [np.load(path) for path in sorted(second.results.glob("embeddings/npz/part0/*.npz"))]
    assert [sorted(archive) for archive in archives] == [["attention_layer1", "bos_layer1"]] * 3
    maps = [archive["attention_layer1"] for archive in archives]
    assert max(each.shape for each in maps) == (2, 102, 102)
    assert all(np.allclose(each.sum(-1), 1, atol=1e-5) for each in maps)
    certificate = json.loads((second.results / "certificate.json").read_text())
    assert certificate["passed"]
    assert sorted(certificate["outputs"]) == ["attention_layer1", "bos_layer1"]
