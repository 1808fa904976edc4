"""The forecast is what a run writes, and a run that does not fit stops with a sentence before it computes."""

import gzip
import os
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plan as plan_step
import pytest
from made_up import proteins, random_model, stored_sequences, write_converted, write_fasta
from stage_settings import plan_settings

from esmflow.arrays import Array
from esmflow.checkpoint.file import read_checkpoint_info
from esmflow.checkpoint.models import ModelDimensions
from esmflow.collect.formats import FORMATS
from esmflow.config.configuration import validated
from esmflow.config.job_estimates import guess_work
from esmflow.files import read_json, write_json
from esmflow.inputs.sheet import InputFile
from esmflow.method import Fingerprint, LongSequences, computing_method
from esmflow.plan import disk_forecast
from esmflow.plan.cost import CostModel
from esmflow.plan.disk_forecast import DiskError, check_disks, sentence
from esmflow.plan.planning import deal_inputs, plan
from esmflow.plan.run_plan import DiskForecast
from esmflow.plan.shards import list_shards, read_shard
from esmflow.store.segments import Segment, Store

SCHEMA = Path(__file__).parents[3] / "workflow" / "schemas" / "config.schema.yaml"
DIMENSIONS = ModelDimensions(6, 320, 20, True, True)
TRUNCATED = LongSequences(60)


def make_fingerprint(include, layers=(6,), **changes):
    fields = {
        "checkpoint": "c", "layers": layers, "include": include, "per_residue_precision": None, "engine": "packed",
        "arithmetic": "", "precision": "fp32", "long_sequences": "truncate", "max_residues": 60,
        "window_overlap": None, "invalid_residues": "reject",
    }  # fmt: skip
    return Fingerprint(**{**fields, **changes})


def make_plan(folder, sequences, stored=None, long=TRUNCATED):
    file = write_fasta(folder / "a.fasta", [(f"protein_{i} of something", s) for i, s in enumerate(sequences)])
    settings = plan_settings(folder, [InputFile("a", str(file))], [folder / "group-0"], CostModel(DIMENSIONS, long))
    return deal_inputs(settings, stored)


def forecast(planned, fingerprint, dimensions, formats, **options):
    return disk_forecast.forecast(planned, fingerprint, dimensions, [FORMATS[name] for name in formats], **options)


@pytest.mark.parametrize(
    "fingerprint",
    [
        make_fingerprint(("mean",)),
        make_fingerprint(("bos", "mean"), (3, 6)),
        make_fingerprint(("per_residue",), per_residue_precision="fp16"),
        make_fingerprint(("contacts", "logits", "mean", "per_residue"), per_residue_precision="fp32"),
    ],
    ids=lambda fingerprint: "+".join(fingerprint.include),
)
def test_segments_are_as_large_as_forecast(tmp_path, fingerprint):
    summary = make_plan(tmp_path, [*proteins(300, 20, 100), *proteins(50, 20, 100)])
    store = Store(tmp_path / "store", fingerprint)
    for shard in list_shards(tmp_path / "group-0"):
        pairs = list(read_shard(shard))
        lengths = np.array([min(60, len(s)) for _, s in pairs])
        arrays = {}
        for name in fingerprint.outputs.names():
            rows = int(Array.named(name).rows(lengths).sum())
            width = {"contacts": (), "logits": (33,)}.get(name, (320,))
            dtype = np.float16 if fingerprint.per_residue_precision == "fp16" else np.float32
            arrays[name] = np.zeros((rows, *width), dtype)
        digests = np.array([list(digest) for digest, _ in pairs], np.uint8)
        store.write(shard.stem, Segment(digests, lengths, arrays, "fp32"))
    written = sum(path.stat().st_size for path in store.folder.iterdir())
    expected = forecast(summary, fingerprint, DIMENSIONS, [])
    assert expected.formats == {}
    assert written == pytest.approx(expected.segments, rel=0.02, abs=2000)


def test_records_that_share_a_sequence_take_room_in_the_formats_and_not_in_the_store(tmp_path):
    once = forecast(make_plan(tmp_path / "1", proteins(100, 40, 40)), make_fingerprint(("mean",)), DIMENSIONS, ["h5"])
    five = forecast(
        make_plan(tmp_path / "5", proteins(100, 40, 40) * 5), make_fingerprint(("mean",)), DIMENSIONS, ["h5"]
    )
    assert five.segments == once.segments == 100 * (320 * 4 + 24)
    assert five.formats["h5"] == pytest.approx(5 * once.formats["h5"], rel=0.01)
    assert five.tables == pytest.approx(5 * once.tables, rel=0.01)


def test_what_a_compressed_file_unpacks_to_is_forecast_before_anything_is_computed(tmp_path):
    records, sequences = 40_000, proteins(3, 100, 100)
    text = "".join(f">{n % 10}\n{sequences[n % 3]}\n" for n in range(records))
    file = tmp_path / "a.faa.gz"
    file.write_bytes(gzip.compress(text.encode()))
    assert file.stat().st_size < len(text) / 100
    settings = plan_settings(
        tmp_path, [InputFile("a", str(file))], [tmp_path / "group-0"], CostModel(DIMENSIONS, TRUNCATED)
    )
    planned = deal_inputs(settings)
    expected = forecast(planned, make_fingerprint(("mean",)), DIMENSIONS, ["npy"])
    assert expected.formats["npy"] > records * 320 * 4
    assert expected.segments < 10_000
    free = os.statvfs(tmp_path)
    many = replace(planned, valid=replace(planned.valid, sequences=free.f_bavail * free.f_frsize // 1000))
    with pytest.raises(DiskError, match=r"npy .* of it to the disk of"):
        check_disks(forecast(many, make_fingerprint(("mean",)), DIMENSIONS, ["npy"]), tmp_path, tmp_path)
    # What a job asks for was a guess from the file's size; from now on it is what is in it.
    planned.write(tmp_path / "plan.json")
    work = guess_work(0, 1, tmp_path / "plan.json", [file])
    assert (work.planned, work.sequences, work.residues) == (True, 3, 180)


def test_what_is_stored_is_not_written_again(tmp_path):
    sequences = proteins(100, 40, 40)
    stored = stored_sequences(tmp_path / "store", {"segment": sequences[:75]})
    found = forecast(make_plan(tmp_path, sequences, stored), make_fingerprint(("mean",)), DIMENSIONS, ["h5"])
    assert found.segments == 25 * (320 * 4 + 24)
    assert found.formats["h5"] > 100 * 320 * 4


def test_what_is_cut_off_takes_no_room_but_windows_take_all(tmp_path):
    kinds = make_fingerprint(("per_residue",), per_residue_precision="fp32")
    cut = forecast(make_plan(tmp_path / "1", proteins(10, 90, 90)), kinds, DIMENSIONS, [])
    whole = forecast(make_plan(tmp_path / "2", proteins(10, 90, 90), long=LongSequences(60, 10)), kinds, DIMENSIONS, [])
    assert cut.segments == 10 * (60 * 320 * 4 + 24)
    assert whole.segments == 10 * (90 * 320 * 4 + 24)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_forecast_in_the_sentence(tmp_path, name):
    found = forecast(make_plan(tmp_path, proteins(10, 40, 40)), make_fingerprint(("mean",)), DIMENSIONS, [name])
    assert f"{name} " in sentence(found)
    assert found.results == found.formats[name] + found.tables


# Disks


@pytest.fixture
def disks(monkeypatch, tmp_path):
    """Two disks of given room: `a` and `b` below the folder."""
    room = {}
    real = os.stat

    def disk(path):
        return 1 if "/a" in str(path).removeprefix(str(tmp_path)) else 2

    monkeypatch.setattr(
        disk_forecast,
        "os",
        SimpleNamespace(
            stat=lambda path: SimpleNamespace(st_dev=disk(path), real=real(path)),
            statvfs=lambda path: SimpleNamespace(f_bavail=room[disk(path)], f_frsize=1),
            PathLike=os.PathLike,
        ),
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()

    def check(segments, results, a, b, store="a/store", results_folder="b/results"):
        room.update({1: a, 2: b})
        expected = DiskForecast(segments, {"h5": results})
        check_disks(expected, tmp_path / store, tmp_path / results_folder)

    return check


def test_store_and_results_on_different_disks_are_looked_at_by_themselves(disks):
    disks(1000, 500, a=1100, b=600)
    with pytest.raises(DiskError, match=r"1\.0 kB of it to the disk of \S*/a/store, where 900 bytes are free"):
        disks(1000, 500, a=900, b=10_000)
    with pytest.raises(DiskError, match=r"510 bytes of it to the disk of \S*/b/results/, where 400 bytes are free"):
        disks(1000, 500, a=10_000, b=400)


def test_store_and_results_on_one_disk_must_fit_together(disks):
    disks(1000, 500, a=0, b=1600, store="b/results/store")
    with pytest.raises(DiskError, match=r"1\.5 kB of it to the disk of \S*/b/results/store and \S*/b/results/"):
        disks(1000, 500, a=10_000, b=1400, store="b/results/store")


def test_the_sentence_names_what_is_written_and_says_what_to_do(disks):
    with pytest.raises(DiskError) as error:
        disks(3_000_000, 2_000_000, a=0, b=0)
    assert "segments 3.0 MB, h5 2.0 MB, manifest 0 bytes" in str(error.value)
    assert "disk_check: false" in str(error.value)


def test_what_an_earlier_run_left_counts_as_free(tmp_path, monkeypatch):
    results = tmp_path / "results"
    (results / "embeddings" / "mean" / "pt").mkdir(parents=True)
    (results / "embeddings" / "mean" / "embeddings.h5").write_bytes(bytes(600_000))
    (results / "embeddings" / "mean" / "pt" / "a_ESM.pt").write_bytes(bytes(300_000))
    (results / "manifest.tsv").write_bytes(bytes(100_000))
    monkeypatch.setattr(
        disk_forecast.os, "statvfs", lambda path: SimpleNamespace(f_bavail=100_000, f_frsize=1), raising=True
    )
    check_disks(DiskForecast(0, {"h5": 1_000_000}), tmp_path / "store", results)
    with pytest.raises(DiskError):
        check_disks(DiskForecast(0, {"h5": 1_300_000}), tmp_path / "store", results)


def test_folders_that_do_not_exist_yet_are_looked_for_above(tmp_path):
    check_disks(DiskForecast(1, {"h5": 1}), tmp_path / "not" / "there", Path("nor/here"))
    with pytest.raises(DiskError):
        check_disks(DiskForecast(10**18, {}), tmp_path / "not" / "there", Path("nor/here"))


@pytest.mark.parametrize("check", [True, False])
def test_a_plan_that_no_disk_can_hold_stops_the_run_unless_that_is_not_wanted(tmp_path, monkeypatch, capsys, check):
    model = convert(tmp_path)
    file = write_fasta(tmp_path / "a.fasta", [(f"p{i}", s) for i, s in enumerate(proteins(50, 20, 30))])
    config = validated({"disk_check": check}, SCHEMA)
    params = {
        "method": computing_method(config), "max_residues": 1022, "nucleotide_sequences": "reject",
        "reading": {"gaps": "reject", "id": "first_word"}, "annotations": [()],
        "assignment": "balanced", "shard_residues": 1000, "gpus_per_job": 1,
        "store": str(tmp_path / "store"), "samples": ["a"], "plan_number": {"plan number": 0},
        "groups": {"groups": 1, "work": 0.0, "least": 0.0},
    }  # fmt: skip
    outputs = {
        "records": "records.parquet",
        "plan": "plan/plan.json",
        "candidates": "candidates.fasta",
    }
    job = SimpleNamespace(
        input=SimpleNamespace(fasta=[str(file)], variants=[], **model),
        output=SimpleNamespace(
            groups=[str(tmp_path / "group-0")], **{name: str(tmp_path / path) for name, path in outputs.items()}
        ),
        params=SimpleNamespace(**params),
        config={**config, "formats": ["h5"]},
        threads=1,
    )
    monkeypatch.setattr(disk_forecast.os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=4096))
    if check:
        with pytest.raises(DiskError, match=r"where 4\.1 kB are free"):
            plan(plan_step.plan_settings(job))
        assert not (tmp_path / "plan" / "plan.json").exists()
    else:
        plan(plan_step.plan_settings(job))
        assert read_json(tmp_path / "plan" / "plan.json")["disk_forecast"]["segments"] == 50 * (4 * 32 + 24)
    assert "esmflow: the run will write about" in capsys.readouterr().err


def convert(folder: Path) -> dict[str, str]:
    """A small checkpoint and its description, as the model step leaves them."""
    checkpoint = write_converted(folder / "checkpoint.safetensors", random_model())
    write_json(folder / "model.json", asdict(read_checkpoint_info(checkpoint)))
    return {"checkpoint": str(checkpoint), "model": str(folder / "model.json")}


def test_a_format_is_forecast_for_what_it_holds_and_in_the_precision_that_it_is_written_in(tmp_path):
    summary, kinds = make_plan(tmp_path, proteins(10, 40, 40)), make_fingerprint(("mean", "per_residue"))
    residues = 10 * 40 * 320 * 4
    whole = forecast(summary, kinds, DIMENSIONS, ["h5", "h5ad"]).formats
    half = forecast(summary, kinds, DIMENSIONS, ["h5", "h5ad"], pooled_precision="fp16").formats
    assert whole["h5"] > residues > whole["h5ad"] > 10 * 320 * 4
    assert whole["h5"] - half["h5"] == whole["h5ad"] - half["h5ad"] == 10 * 320 * 2
