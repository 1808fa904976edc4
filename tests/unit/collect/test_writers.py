"""Each format holds every vector it was given, under its id, in the order it came."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest
import torch
from collected_run import CollectedRun, MadeUpRecord, random_segment
from made_up import proteins

from esmflow.arrays import PER_LAYER, Array, Outputs
from esmflow.collect.formats import FORMATS
from esmflow.collect.tables import MANIFEST_SCHEMA
from esmflow.collect.writers.base import Batch, Description
from esmflow.errors import EsmflowError
from esmflow.inputs.sheet import fasta_stem

WIDTH = 6
IDS = ["a", "b", "a", "../../etc/passwd", "sp|P1|X", 'tab"quote', "naïve", "i" * 300, r"caf\xe9 \x00", "", "b"]
VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}


def describe(array: str) -> Description:
    return Description(Array.named(array), "esm2_t6_8M_UR50D", "bf16", "f" * 32, VERSIONS)


def make(count: int, per_residue: bool = False, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and lengths."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 9, count)
    return random.standard_normal((lengths.sum() if per_residue else count, WIDTH)).astype(np.float32), lengths


def batch(ids: list[str], arrays: dict[Array, np.ndarray], lengths: np.ndarray, file: str = "a.fasta") -> Batch:
    """Records of one file, numbered from 1."""
    columns = {
        "sample": ["sample of " + file] * len(ids),
        "file": [file] * len(ids),
        "record": range(1, len(ids) + 1),
        "id": ids,
        "description": [f"protein {i}" for i in range(len(ids))],
        "length": lengths,
    }
    missing = {field.name: pa.nulls(len(ids), field.type) for field in MANIFEST_SCHEMA if field.name not in columns}
    table = pa.table({**columns, **missing})
    return Batch(table.select(MANIFEST_SCHEMA.names).cast(MANIFEST_SCHEMA), arrays, lengths)


def write(folder, name: str, array: str, files: dict[str, list[tuple[list[str], np.ndarray, np.ndarray]]]) -> None:
    with FORMATS[name].load_writer()(folder, [describe(array)]) as writer:
        for path, blocks in files.items():
            writer.begin_file(fasta_stem(path))
            for ids, vectors, lengths in blocks:
                writer.add(batch(ids, {Array.named(array): vectors}, lengths, path))
        if not writer.by_file and not any(files.values()):
            writer.add(batch([], {Array.named(array): np.empty((0, 0), np.float32)}, np.empty(0, np.int64)))


def load_pt(path) -> dict:
    return torch.load(path, weights_only=True)


# pt


def test_a_pt_has_ids_and_vectors_in_input_order_and_repeated_ids_are_repeated(tmp_path):
    vectors, lengths = make(len(IDS))
    write(tmp_path, "pt", "mean_layer6", {"in/a.faa.gz": [(IDS, vectors, lengths)]})
    found = load_pt(tmp_path / "pt" / "a_ESM.pt")
    assert found.keys() == {"proteins", "data"}
    assert found["proteins"] == IDS
    assert all(tensor.dtype == torch.float32 and tensor.shape == (WIDTH,) for tensor in found["data"])
    assert np.array_equal(torch.stack(found["data"]).numpy(), vectors)


def test_each_input_file_has_a_pt_of_its_own(tmp_path):
    first, second = make(2, seed=1), make(3, seed=2)
    files = {"x/a.fasta": [(["p", "q"], *first)], "y/b.fasta": [(["p", "r", "s"], *second)]}
    write(tmp_path, "pt", "mean_layer6", files)
    assert sorted(os.listdir(tmp_path / "pt")) == ["a_ESM.pt", "b_ESM.pt"]
    assert load_pt(tmp_path / "pt" / "a_ESM.pt")["proteins"] == ["p", "q"]
    assert np.array_equal(torch.stack(load_pt(tmp_path / "pt" / "b_ESM.pt")["data"]).numpy(), second[0])


def test_blocks_of_one_file_are_one_pt(tmp_path):
    blocks = [([f"{seed}.{i}" for i in range(4)], *make(4, seed=seed)) for seed in range(3)]
    write(tmp_path, "pt", "mean_layer6", {"a.fasta": blocks})
    found = load_pt(tmp_path / "pt" / "a_ESM.pt")
    assert found["proteins"] == [f"{seed}.{i}" for seed in range(3) for i in range(4)]
    assert np.array_equal(torch.stack(found["data"]).numpy(), np.concatenate([vectors for _, vectors, _ in blocks]))


def test_a_file_without_embedded_records_has_an_empty_pt(tmp_path):
    write(tmp_path, "pt", "mean_layer6", {"a.fasta": [], "b.fasta": [(["p"], *make(1))]})
    assert load_pt(tmp_path / "pt" / "a_ESM.pt") == {"proteins": [], "data": []}
    assert load_pt(tmp_path / "pt" / "b_ESM.pt")["proteins"] == ["p"]


def test_a_per_residue_pt_has_a_row_for_each_residue(tmp_path):
    vectors, lengths = make(5, per_residue=True)
    write(tmp_path, "pt", "per_residue_layer6", {"a.fasta": [(list("abcde"), vectors, lengths)]})
    data = load_pt(tmp_path / "pt" / "a_ESM.pt")["data"]
    assert [tuple(tensor.shape) for tensor in data] == [(n, WIDTH) for n in lengths]
    assert np.array_equal(torch.cat(data).numpy(), vectors)


def test_a_vector_changed_after_loading_changes_no_other(tmp_path):
    write(tmp_path, "pt", "mean_layer6", {"a.fasta": [(["p", "q"], *make(2))]})
    data = load_pt(tmp_path / "pt" / "a_ESM.pt")["data"]
    before = data[1].clone()
    data[0].zero_()
    assert torch.equal(data[1], before)


def test_a_pt_is_hardly_larger_than_its_vectors(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((2000, 320)).astype(np.float32)
    write(tmp_path, "pt", "mean_layer6", {"a.fasta": [([str(i) for i in range(2000)], vectors, np.ones(2000, int))]})
    assert (tmp_path / "pt" / "a_ESM.pt").stat().st_size < 1.2 * vectors.nbytes


def test_what_was_mapped_from_a_segment_need_not_outlive_it(tmp_path):
    vectors, lengths = make(3)
    vectors.tofile(tmp_path / "mapped")
    mapped = np.memmap(tmp_path / "mapped", np.float32, "r", shape=vectors.shape)
    write(tmp_path, "pt", "mean_layer6", {"a.fasta": [(list("abc"), mapped, lengths)]})
    write(tmp_path, "h5", "mean_layer6", {"a.fasta": [(list("abc"), mapped, lengths)]})
    (tmp_path / "mapped").unlink()
    assert np.array_equal(torch.stack(load_pt(tmp_path / "pt" / "a_ESM.pt")["data"]).numpy(), vectors)
    with h5py.File(tmp_path / "embeddings.h5") as file:
        assert np.array_equal(file["embeddings"][:], vectors)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("viruses/a.faa.gz", "a_ESM.pt"),
        ("a.b.fasta", "a.b_ESM.pt"),
        ("../x/plain", "plain_ESM.pt"),
        ("100%.fa", "100%_ESM.pt"),
    ],
)
def test_a_pt_is_named_after_its_input(tmp_path, path, name):
    write(tmp_path, "pt", "mean_layer6", {path: [(["p"], *make(1))]})
    assert os.listdir(tmp_path / "pt") == [name]


# h5


def test_an_h5_has_ids_vectors_and_attributes(tmp_path):
    vectors, lengths = make(len(IDS))
    write(tmp_path, "h5", "mean_layer6", {"a.fasta": [(IDS, vectors, lengths)]})
    with h5py.File(tmp_path / "embeddings.h5") as file:
        assert file["ids"].asstr()[:].tolist() == IDS
        assert file["embeddings"].dtype == np.float32
        assert np.array_equal(file["embeddings"][:], vectors)
        assert "offsets" not in file
        assert dict(file.attrs) == {
            "model": "esm2_t6_8M_UR50D",
            "layer": 6,
            "pooling": "mean",
            "precision": "bf16",
            "fingerprint": "f" * 32,
            "version_python": "3.11.7",
            "version_torch": "2.13.0",
        }


def test_files_and_blocks_follow_one_another_in_one_h5(tmp_path):
    blocks = [([f"{seed}.{i}" for i in range(50)], *make(50, seed=seed)) for seed in range(4)]
    write(tmp_path, "h5", "bos_layer3", {"a.fasta": blocks[:3], "empty.fasta": [], "b.fasta": blocks[3:]})
    with h5py.File(tmp_path / "embeddings.h5") as file:
        assert file["ids"].asstr()[:].tolist() == [i for ids, _, _ in blocks for i in ids]
        assert np.array_equal(file["embeddings"][:], np.concatenate([vectors for _, vectors, _ in blocks]))
        assert (file.attrs["layer"], file.attrs["pooling"]) == (3, "bos")


def test_a_per_residue_h5_says_where_each_record_is(tmp_path):
    blocks = [(list(ids), *make(len(ids), per_residue=True, seed=len(ids))) for ids in ("abc", "defgh")]
    write(tmp_path, "h5", "per_residue_layer6", {"a.fasta": blocks})
    lengths = np.concatenate([block[2] for block in blocks])
    vectors = np.concatenate([block[1] for block in blocks])
    with h5py.File(tmp_path / "embeddings.h5") as file:
        offsets = file["offsets"][:]
        assert file["ids"].asstr()[:].tolist() == list("abcdefgh")
        assert np.diff(offsets).tolist() == lengths.tolist()
        assert offsets[0] == 0
        assert np.array_equal(file["embeddings"][offsets[4] : offsets[5]], vectors[sum(lengths[:4]) : sum(lengths[:5])])
        assert np.array_equal(file["embeddings"][:], vectors)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        (name, f"{kind}_layer6" if kind in (*PER_LAYER, "attention") else kind)
        for name, each in FORMATS.items()
        for kind in each.kinds
    ],
)
def test_every_format_can_be_of_nothing(tmp_path, name, array):
    write(tmp_path, name, array, {"a.fasta": []})
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("array", ["mean_layer6", "per_residue_layer6"])
def test_an_h5_of_nothing_is_a_file_with_nothing_in_it(tmp_path, array):
    write(tmp_path, "h5", array, {"a.fasta": []})
    with h5py.File(tmp_path / "embeddings.h5") as file:
        assert len(file["embeddings"]) == len(file["ids"]) == 0


def test_chunks_of_an_h5_fit_its_rows(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((40, 1280)).astype(np.float32)
    ids = [f"protein{i}" for i in range(40)]
    for name, file in (("h5", "embeddings.h5"), ("h5ad", "embeddings.h5ad")):
        write(tmp_path, name, "mean_layer6", {"a.fasta": [(ids, vectors, np.full(40, 9))]})
        assert vectors.nbytes < (tmp_path / file).stat().st_size < vectors.nbytes + 100_000
    many = np.zeros((5000, 320), np.float32)
    write(tmp_path / "many", "h5", "mean_layer6", {"a.fasta": [(ids * 125, many, np.ones(5000, int))]})
    with h5py.File(tmp_path / "many" / "embeddings.h5") as file:
        assert file["embeddings"].chunks == ((1 << 20) // 1280, 320)


@pytest.mark.parametrize("name", ["h5", "h5ad", "h5_per_protein"])
def test_an_hdf5_file_is_written_without_a_lock(tmp_path, name):
    """There are file systems that have none: HDF5 fails there with errno 37, "No locks available"."""
    with FORMATS[name].load_writer()(tmp_path, [describe("mean_layer6")]) as writer:
        writer.add(batch(["p"], {Array("mean", 6): make(1)[0]}, np.ones(1, int)))
        (part,) = tmp_path.glob(".*.part")
        locked = [line.split()[5].split(":")[2] for line in Path("/proc/locks").read_text().splitlines()]
        assert str(part.stat().st_ino) not in locked


# npy


def ids_of_npy(folder) -> list[str]:
    ids = np.char.decode(np.load(folder / "ids.npy", mmap_mode="r"), "utf-8").tolist()
    if (folder / "long_ids.jsonl").exists():
        for line in (folder / "long_ids.jsonl").read_text(encoding="utf-8").splitlines():
            ids[json.loads(line)["row"]] = json.loads(line)["id"]
    return ids


@pytest.mark.parametrize("longest", [90, 5000])
def test_one_long_id_does_not_make_all_ids_wide(tmp_path, longest):
    ids = [f"protein{i:06d}" for i in range(30_000)]
    ids[12_345], ids[29_999] = "é" * (longest // 2), "x" * (longest - 10)
    blocks = [(ids[start : start + 7_000], *make(len(ids[start : start + 7_000]))) for start in range(0, 30_000, 7_000)]
    write(tmp_path, "npy", "mean_layer6", {"a.fasta": blocks})
    stored = np.load(tmp_path / "ids.npy", mmap_mode="r")
    assert stored.dtype.itemsize == min(longest, 100)
    assert (tmp_path / "long_ids.jsonl").exists() == (longest > 100)
    assert ids_of_npy(tmp_path) == ids
    # Cut ids still tell records apart.
    assert len(set(stored.tolist())) == 30_000
    assert stored[12_345].decode().startswith("éééé")


def test_ids_that_are_long_as_a_rule_are_kept_whole(tmp_path):
    ids = [f"{'long' * 60}{i:06d}" for i in range(6_000)]
    write(tmp_path, "npy", "mean_layer6", {"a.fasta": [(ids, *make(6_000))]})
    assert np.load(tmp_path / "ids.npy").tolist() == [identifier.encode() for identifier in ids]
    assert not (tmp_path / "long_ids.jsonl").exists()


@pytest.mark.parametrize("letter", ["n", "蛋"])
def test_an_input_file_may_have_the_longest_name_that_a_file_system_allows(tmp_path, letter):
    names = [f"{first}{letter * (250 // len(letter.encode()))}.faa" for first in "ab"]
    sequences, outputs = proteins(2, 20, 30), Outputs((1,), ("mean",))
    records = [MadeUpRecord(name, f"p{n}", sequence) for n, (name, sequence) in enumerate(zip(names, sequences))]
    run = CollectedRun(tmp_path, records, [random_segment(sequences, outputs)], outputs)
    embeddings = run.collect(["pt", "esm"])
    assert [len(list(embeddings.rglob(pattern))) for pattern in ("*_ESM.pt", "p?.pt")] == [2, 2]
    for name in names:
        assert (embeddings / "mean_layer1" / "pt" / f"{fasta_stem(name)}_ESM.pt").exists()


def test_a_file_of_a_run_that_is_damaged_is_a_sentence_that_names_it(tmp_path):
    sequences, outputs = proteins(2, 20, 30), Outputs((1,), ("mean",))
    run = CollectedRun(
        tmp_path, [MadeUpRecord("a.faa", "p", sequences[0])], [random_segment(sequences, outputs)], outputs
    )
    for name in ("plan.json", "run.json"):
        whole = (tmp_path / name).read_text()
        for damaged in (whole[:-20], whole.replace("{", "[", 1), "", "null"):
            (tmp_path / name).write_text(damaged)
            with pytest.raises(EsmflowError, match=rf"{name}: not what esmflow wrote .*; delete it"):
                run.collect(["h5"])
        (tmp_path / name).write_text(whole)
    run.collect(["h5"])
