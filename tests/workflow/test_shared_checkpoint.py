"""One conversion of a checkpoint for a whole site: Snakemake's own cache between workflows."""

from made_up import random_model, stored_tensors, write_fair_esm


def test_a_second_run_in_another_folder_takes_the_converted_checkpoint_from_the_site_s_cache(tmp_path, quick_run):
    model = write_fair_esm(tmp_path / "site.pt", stored_tensors(random_model(2, 32, 2)))
    (tmp_path / "cache").mkdir()
    environment = {"SNAKEMAKE_OUTPUT_CACHE": str(tmp_path / "cache")}
    first, second = (quick_run(3, folder=name, model=str(model), groups=1) for name in ("first", "second"))
    first.succeed("--cache", "--until", "model", environment=environment)
    # What a run takes of a checkpoint is not in it: other layers share it.
    second.configure(layers=[1], include=["bos"])
    second.succeed("--cache", environment=environment)
    assert "site.pt" in (first.folder / "logs" / "model.log").read_text()
    assert (second.folder / "logs" / "model.log").read_text() == ""
    converted = [(run.results / "model" / "checkpoint.safetensors").resolve() for run in (first, second)]
    assert converted[0] == converted[1]
    assert converted[0].is_relative_to(tmp_path / "cache")
    assert second.summary()["embedded"] == 3
