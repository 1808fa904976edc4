"""Every format, through the real collect: what it holds, what it does with difficult ids, that its readers open it."""

import csv
import gc
import logging
import re
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from urllib.parse import unquote

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from collected_run import CollectedRun, MadeUpRecord, random_segment, read_h5ad
from made_up import proteins, random_model, write_converted

from esmflow.arrays import INCLUDE, Array, Outputs
from esmflow.collect import streaming
from esmflow.collect.formats import FORMATS, check_formats
from esmflow.collect.joining import CollectError
from esmflow.collect.writers import parquet
from esmflow.collect.writers.names import NameGiver
from esmflow.engine.extraction import extract_esm_features
from esmflow.engine.fair_esm import ReferenceEngine
from esmflow.files import read_json, safe_name
from esmflow.inputs.residues import sequence_digest
from esmflow.store.segments import Segment

PROJECT = Path(__file__).resolve().parents[3]
DOCUMENT = (PROJECT / "docs" / "formats.md").read_text()
SNIPPETS = {title: code for title, code in re.findall(r"```python\n# ([^\n]+)\n(.*?)```", DOCUMENT, re.DOTALL)}
LAYER = 36
OUTPUTS = Outputs((LAYER,), INCLUDE)
IDS = ["a", "b", "a", "../../etc/passwd", "sp|P1|X", 'tab"quote', "naïve", "i" * 300, r"caf\xe9", "", "b", "a-1", "a~2"]
COLUMNAR = ["h5", "npy", "parquet", "h5ad"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> CollectedRun:
    """Difficult ids in two files, their sequences in three segments in another order."""
    sequences = proteins(len(IDS) + 2, 3, 9, seed=5)
    records = [MadeUpRecord("in/x.fasta", i, s, f"protein {n}") for n, (i, s) in enumerate(zip(IDS, sequences))]
    records += [MadeUpRecord("in/y.faa.gz", i, s) for i, s in zip(["a", "c"], sequences[len(IDS) :])]
    order = np.random.default_rng(0).permutation(len(sequences))
    segments = [
        random_segment([sequences[i] for i in part], OUTPUTS, seed=n) for n, part in enumerate(np.array_split(order, 3))
    ]
    made = CollectedRun(tmp_path_factory.mktemp("run"), records, segments, OUTPUTS)
    made.records = records
    return made


@pytest.fixture(scope="module")
def embeddings(run) -> Path:
    """Everything, in every format."""
    return run.collect(list(FORMATS))


def expected(run: CollectedRun, array: str) -> list[tuple[str, np.ndarray]]:
    """Ids and values in input order, taken from the segments by themselves."""
    values = {}
    for name in run.store.names():
        segment = run.store.read(name)
        offsets = segment.offsets(array)
        for i, digest in enumerate(segment.digests):
            rows = np.array(segment.arrays[array][offsets[i] : offsets[i + 1]])
            shape = (segment.lengths[i], segment.lengths[i]) if array == "contacts" else rows.shape
            values[digest.tobytes()] = rows[0] if Array.named(array).is_pooled else rows.reshape(shape)
    return [(record.id, values[sequence_digest(record.sequence)]) for record in run.records]


def same(found: list, wanted: list) -> bool:
    return [i for i, _ in found] == [i for i, _ in wanted] and all(
        np.array_equal(np.asarray(a), b) for (_, a), (_, b) in zip(found, wanted)
    )


# The documentation


@pytest.mark.parametrize("title", SNIPPETS)
def test_the_example_in_the_documentation_reads_the_vectors(run, embeddings, title):
    found: dict = {"embeddings": str(embeddings), "folder": f"{embeddings}/mean_layer{LAYER}"}
    exec(SNIPPETS[title], found)
    array = f"per_residue_layer{LAYER}" if "per residue" in title else f"mean_layer{LAYER}"
    pairs, wanted = list(zip(found["ids"], found["vectors"], strict=True)), expected(run, array)
    if title.startswith("h5_per_protein"):
        pairs, wanted = (sorted(each, key=lambda pair: (pair[0], pair[1].tolist())) for each in (pairs, wanted))
    assert same(pairs, wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_documented_with_an_example_and_what_it_does_with_equal_ids(name):
    assert name in {title.partition(",")[0] for title in SNIPPETS}
    section = DOCUMENT.split(f"\n## {name}\n")[1].split("\n## ")[0]
    assert "Equal ids" in section
    (row,) = re.findall(rf"^\| `{name}` \|.*\| (.+) \|$", DOCUMENT, re.MULTILINE)
    held = set(FORMATS[name].kinds)
    assert held == ({*INCLUDE, *row.split(", ")[1:]} if row.startswith("everything") else set(row.split(", ")))
    assert f"`{name}`" in (PROJECT / "config" / "README.md").read_text()
    if "per_residue" in held:
        assert f"{name}, per residue" in SNIPPETS


# What each holds


@pytest.mark.parametrize("array", ["contacts", "logits", "entropy", f"per_residue_layer{LAYER}"])
def test_formats_that_hold_more_than_vectors_agree_on_it(run, embeddings, array):
    wanted = expected(run, array)
    folder = embeddings / array
    with h5py.File(folder / "embeddings.h5") as file:
        ids, offsets, rows = file["ids"].asstr()[:].tolist(), file["offsets"][:], file["embeddings"][:]
    shaped = [rows[a:b].reshape(v.shape) for a, b, (_, v) in zip(offsets, offsets[1:], wanted)]
    assert same(list(zip(ids, shaped)), wanted)
    assert np.array_equal(np.load(folder / "embeddings.npy"), rows)
    assert np.array_equal(np.load(folder / "offsets.npy"), offsets)
    loaded = [torch.load(folder / "pt" / f"{stem}_ESM.pt", weights_only=True) for stem in ("x", "y")]
    assert same([pair for c in loaded for pair in zip(c["proteins"], c["data"])], wanted)
    if FORMATS["parquet"].holds(Array.named(array)):
        table = pq.read_table(folder / "embeddings.parquet")
        assert same(list(zip(table["id"].to_pylist(), map(np.array, table["embedding"].to_pylist()))), wanted)
    else:
        assert not (folder / "embeddings.parquet").exists()
    assert not (folder / "embeddings.h5ad").exists()


@pytest.mark.parametrize("array", [f"max_layer{LAYER}", f"std_layer{LAYER}", "pseudo_perplexity"])
def test_formats_agree_on_what_has_one_row_for_each_record(run, embeddings, array):
    wanted, folder = expected(run, array), embeddings / array
    values = np.stack([value for _, value in wanted])
    with h5py.File(folder / "embeddings.h5") as file:
        assert np.array_equal(file["embeddings"][:], values)
        assert "offsets" not in file
    assert np.array_equal(np.load(folder / "embeddings.npy"), values)
    column = pq.read_table(folder / "embeddings.parquet")["embedding"]
    assert np.array_equal(np.array(column.to_pylist(), np.float32), values)
    assert str(column.type) == ("float" if values.ndim == 1 else "fixed_size_list<element: float>[8]")
    assert np.array_equal(read_h5ad(folder / "embeddings.h5ad").X, values.reshape(len(values), -1))
    loaded = [torch.load(folder / "pt" / f"{stem}_ESM.pt", weights_only=True) for stem in ("x", "y")]
    assert same([pair for c in loaded for pair in zip(c["proteins"], c["data"])], wanted)
    with h5py.File(folder / "per_protein.h5") as file:
        assert sorted(dataset[()].tolist() for dataset in file.values()) == sorted(values.tolist())
    content = torch.load(embeddings / "esm" / "x" / "b.pt", weights_only=True)
    kind, _, layer = array.partition("_layer")
    found = content[f"{kind}_representations"][int(layer)] if layer else content[kind]
    assert np.array_equal(found, wanted[1][1])


def test_parquet_has_a_fixed_size_list_for_each_record_and_leads_to_the_manifest(run, embeddings):
    path = embeddings / f"mean_layer{LAYER}" / "embeddings.parquet"
    table = pq.read_table(path)
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[8]"
    manifest = pq.read_table(run.folder / "results" / "manifest.parquet")
    for column in ("id", "sample", "file", "record", "length"):
        assert table[column].to_pylist() == manifest[column].to_pylist()
    assert pq.read_metadata(path).metadata[b"model"] == b"made up"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("name", FORMATS)
def test_a_full_disk_is_an_error_that_leaves_no_file_behind(tmp_path, small_disk, name):
    outputs, sequences = Outputs((6,), ("mean",)), proteins(800, 5, 9)
    made = CollectedRun(tmp_path, as_records(sequences), [random_segment(sequences, outputs, 1024)], outputs)
    before = threading.active_count()
    with pytest.raises(OSError, match="No space left on device"):
        made.collect([name], str(small_disk / "results"))
    gc.collect()
    assert threading.active_count() == before
    assert [path for path in small_disk.rglob("*") if path.is_file()] == []
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert made.collect([name], str(small_disk / "results")).exists()


@pytest.mark.parametrize("array", ["mean_layer6", "per_residue_layer6"])
def test_a_parquet_of_many_pieces_and_row_groups_has_all_in_order(tmp_path, monkeypatch, array):
    monkeypatch.setattr(streaming, "_PIECE_BYTES", 20_000)
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 3_000)
    outputs = Outputs((6,), ("mean", "per_residue"))
    sequences = proteins(300, 5, 9)
    made = CollectedRun(tmp_path, as_records(sequences), [random_segment(sequences, outputs)], outputs)
    folder = made.collect(["parquet", "npy"]) / array
    with pq.ParquetFile(folder / "embeddings.parquet") as file:
        table = file.read()
        # Readers take a row group at a time: a few thousand bytes here, but for what the first piece made of that.
        sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    assert len(set(sizes[:-1])) == 1
    assert len(sizes) > 3
    values = table["embedding"].combine_chunks()
    while not pa.types.is_floating(values.type):
        values = values.flatten()
    assert np.array_equal(values.to_numpy(), np.load(folder / "embeddings.npy").ravel())
    assert [identifier.encode() for identifier in table["id"].to_pylist()] == np.load(folder / "ids.npy").tolist()


def test_a_parquet_that_is_given_up_leaves_no_thread_and_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_PIECE_BYTES", 2_000)
    outputs = Outputs((6,), ("mean",))
    sequences = proteins(400, 5, 9)
    segment = random_segment(sequences, outputs)
    segment.arrays["mean_layer6"][-1, 0] = 1e6
    made = CollectedRun(tmp_path, as_records(sequences), [segment], outputs)
    before = threading.active_count()
    with pytest.raises(CollectError, match="65504"):
        made.collect(["parquet"], pooled_precision="fp16")
    assert threading.active_count() == before
    assert not list(tmp_path.rglob("embeddings.parquet"))


FILLS_THE_DISK = """
import resource, sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from collected_run import CollectedRun, random_segment
from made_up import proteins
from test_formats import as_records
from esmflow.collect import streaming
from esmflow.arrays import Outputs
streaming._PIECE_BYTES = 1 << 18
outputs, sequences = Outputs((6,), ("mean",)), proteins(800, 5, 9)
made = CollectedRun(Path(sys.argv[3]), as_records(sequences), [random_segment(sequences, outputs, 2048)], outputs)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    made.collect(["parquet"])
except OSError as error:
    print(error)
"""


def test_a_parquet_that_cannot_be_written_is_an_error_of_the_system(tmp_path):
    tests = PROJECT / "tests" / "support"
    command = [sys.executable, "-c", FILLS_THE_DISK, str(PROJECT / "workflow" / "scripts"), str(tests), str(tmp_path)]
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=PROJECT / "tests" / "unit" / "collect", timeout=120
    )
    assert "embeddings.parquet cannot be written" in run.stdout
    assert "File too large" in run.stdout
    assert not list(tmp_path.rglob("embeddings.parquet"))


def test_an_h5ad_has_unique_names_and_every_id(run, embeddings, tmp_path):
    data = read_h5ad(embeddings / f"mean_layer{LAYER}" / "embeddings.h5ad")
    assert data.obs_names.is_unique
    ids = [record.id for record in run.records]
    assert data.obs["id"].tolist() == ids
    assert data.obs_names.tolist()[:3] == ["a", "b", "a-2"]
    assert data.obs_names.tolist()[10:14] == ["b-1", "a-1", "a~2", "a-3"]
    assert data.obs["file"].tolist() == [record.file for record in run.records]
    assert [str(data.obs[column].dtype) for column in ("file", "sample")] == ["category"] * 2
    assert data.obs["record"].tolist() == [*range(1, len(IDS) + 1), 1, 2]
    assert data.obs["length"].tolist() == [len(record.sequence) for record in run.records]
    assert (data.uns["esmflow"]["layer"], data.uns["esmflow"]["model"]) == (LAYER, "made up")
    # What AnnData read, it can cut and write again.
    data[data.obs["length"] > 4].copy().write_h5ad(tmp_path / "again.h5ad")
    assert read_h5ad(tmp_path / "again.h5ad").n_obs == sum(len(r.sequence) > 4 for r in run.records)


def test_an_h5ad_of_ids_that_differ_has_them_as_names(tmp_path):
    outputs = Outputs((6,), ("mean",))
    sequences = proteins(4, 5, 9)
    records = [MadeUpRecord("a.fasta", f"p{i}", s) for i, s in enumerate(sequences)]
    made = CollectedRun(tmp_path, records, [random_segment(sequences, outputs)], outputs)
    data = read_h5ad(made.collect(["h5ad"]) / "mean_layer6" / "embeddings.h5ad", backed="r")
    assert data.obs_names.tolist() == data.obs["id"].tolist() == ["p0", "p1", "p2", "p3"]
    assert data.X.shape == (4, 8)
    data.file.close()


def test_every_format_of_several_files_has_the_sample_beside_the_id(run, embeddings):
    samples = samples_of(run)
    folder = embeddings / f"mean_layer{LAYER}"
    with h5py.File(folder / "embeddings.h5") as file:
        assert file["samples"].asstr()[:][file["sample_numbers"][:]].tolist() == samples
    names = read_json(folder / "samples.json")
    assert [names[number] for number in np.load(folder / "sample_numbers.npy")] == samples
    assert pq.read_table(folder / "embeddings.parquet")["sample"].to_pylist() == samples
    assert read_h5ad(folder / "embeddings.h5ad").obs["sample"].tolist() == samples
    pairs = sorted((record.id, f"sample of {record.file}") for record in run.records)
    with h5py.File(folder / "per_protein.h5") as file:
        assert sorted((d.attrs["original_id"], d.attrs["sample"]) for d in file.values()) == pairs
        assert file.attrs["model_name"] == file.attrs["model"] == "made up"


def read_as_scikit_bio_does(path: Path) -> list[tuple[str, np.ndarray]]:
    """Sequences and values: the steps of its reader for the format `embed`."""
    with h5py.File(path) as file:
        begin, first, found = 0, 0, []
        for i, end in enumerate(file["idptr"]):
            last = file["embedding_ptr"][i] if "embedding_ptr" in file else end
            sequence = file["id"][begin:end].tobytes().decode("ascii")
            found.append((sequence, file["embedding"][first if "embedding_ptr" in file else begin : last]))
            begin, first = end, last
        return found


@pytest.mark.parametrize("kind", ["mean", "bos", "max", "std", "per_residue"])
def test_scikit_bio_gets_every_sequence_with_its_values(run, embeddings, kind):
    array = f"{kind}_layer{LAYER}"
    found = read_as_scikit_bio_does(embeddings / array / "embeddings.skbio.h5")
    assert [sequence for sequence, _ in found] == [record.sequence for record in run.records]
    wanted = [value.reshape(-1, 8) for _, value in expected(run, array)]
    assert all(np.array_equal(value, other) for (_, value), other in zip(found, wanted, strict=True))
    with h5py.File(embeddings / array / "embeddings.skbio.h5") as file:
        assert file["samples"].asstr()[:][file["sample_numbers"][:]].tolist() == samples_of(run)
        assert [file.attrs[name] for name in ("format", "format-version", "dtype", "dim")] == [
            "embedding",
            "1.0",
            "float32",
            8,
        ]


def test_an_input_that_was_changed_after_planning_is_no_source_of_sequences(tmp_path):
    outputs, sequences = Outputs((6,), ("mean",)), proteins(5, 5, 9)
    made = CollectedRun(tmp_path, as_records(sequences), [random_segment(sequences, outputs)], outputs)
    text = (tmp_path / "a.fasta").read_text()
    (tmp_path / "a.fasta").write_text(text.replace(f"\n{sequences[3]}\n", "\nMKV\n"))
    with pytest.raises(CollectError, match=r"a\.fasta, record 4 \(p3\): its sequence is not the one that was planned"):
        made.collect(["skbio"])
    (tmp_path / "a.fasta").write_text(text[: text.index(">p3")])
    with pytest.raises(CollectError, match=r"a\.fasta, record 4 \(p3\)"):
        made.collect(["skbio"])
    (tmp_path / "a.fasta").unlink()
    with pytest.raises(CollectError, match=r"a\.fasta cannot be read again"):
        made.collect(["skbio"])
    assert not list(tmp_path.rglob("*.skbio.h5"))
    made.collect(["h5"])


def samples_of(run: CollectedRun) -> list[str]:
    return [f"sample of {record.file}" for record in run.records]


def test_files_that_share_a_stem_are_named_by_their_samples(tmp_path):
    outputs, sequences = Outputs((6,), ("mean",)), proteins(5, 5, 9)
    files = ["GCF_1/protein.faa", "GCF_1/protein.faa", "GCF_2/protein.faa", "GCF_2/protein.faa", "other.faa"]
    records = [MadeUpRecord(file, f"p{i}", s) for i, (file, s) in enumerate(zip(files, sequences))]
    made = CollectedRun(tmp_path, records, [random_segment(sequences, outputs)], outputs)
    folder = made.collect(["pt", "esm", "h5"])
    names = {
        "sample of GCF_1%2Fprotein.faa": ["p0", "p1"],
        "sample of GCF_2%2Fprotein.faa": ["p2", "p3"],
        "other": ["p4"],
    }
    names = {name.replace(" ", "%20"): ids for name, ids in names.items()}
    assert {path.name for path in (folder / "mean_layer6" / "pt").iterdir()} == {f"{name}_ESM.pt" for name in names}
    assert {path.name for path in (folder / "esm").iterdir()} == set(names)
    for name, ids in names.items():
        path = folder / "mean_layer6" / "pt" / f"{name}_ESM.pt"
        assert torch.load(path, weights_only=True)["proteins"] == ids
        assert {path.stem for path in (folder / "esm" / name).glob("*.pt")} == set(ids)


def test_an_npy_can_be_mapped(embeddings):
    for name in ("embeddings", "ids"):
        assert isinstance(np.load(embeddings / f"mean_layer{LAYER}" / f"{name}.npy", mmap_mode="r"), np.memmap)


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_without_vectors_gives_files_that_open(tmp_path, name):
    folder = CollectedRun(tmp_path, [], [], Outputs((6,), ("mean",))).collect([name]) / "mean_layer6"
    if name == "h5ad":
        assert read_h5ad(folder / "embeddings.h5ad").n_obs == 0
    elif name == "parquet":
        assert len(pq.read_table(folder / "embeddings.parquet")) == 0
    elif name == "npy":
        assert len(np.load(folder / "embeddings.npy")) == len(np.load(folder / "ids.npy")) == 0
    elif name.startswith(("h5", "skbio")):
        with h5py.File(next(folder.iterdir())) as file:
            assert file.attrs["model"] == "made up"


# fair-esm's own files


def test_esm_files_have_what_fair_esm_s_script_would_write_field_for_field(tmp_path):
    model = random_model(2, 16, 2)
    outputs = Outputs((0, 2), ("mean", "bos", "per_residue", "contacts"))
    engine = ReferenceEngine.load(str(write_converted(tmp_path / "c.safetensors", model)), outputs, "fp32", "cpu")
    sequences = proteins(6, 4, 40)
    segment = extract_esm_features([(sequence_digest(s), s) for s in sequences], engine, 500).segment
    headers = [("plain", ""), ("sp|P1|X", "two words OS=some"), ("a/b", ""), ("é", ""), (".hidden", "x"), ("z", "")]
    records = [MadeUpRecord("in/f.fasta", i, s, d) for (i, d), s in zip(headers, sequences)]
    made = CollectedRun(tmp_path, records, [segment], outputs)
    folder = made.collect(["esm"]) / "esm" / "f"
    files = ["plain.pt", "sp|P1|X.pt", "a%2Fb.pt", "é.pt", "%2Ehidden.pt", "z.pt"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*files, "index.tsv"])
    model.eval()
    for file, record in zip(files, records):
        found = torch.load(folder / file, weights_only=True)
        wanted = as_fair_esm_does(model, f"{record.id} {record.description}".strip(), record.sequence, (0, 2))
        assert found.keys() == wanted.keys()
        assert found["label"] == wanted["label"]
        for field in wanted.keys() - {"label"}:
            assert_same_tensors(found[field], wanted[field])
        # A tensor that is saved with what it was cut from would make files as large as the run.
        assert (folder / file).stat().st_size < 20_000 + 4 * sum(t.numel() for t in tensors(wanted))


def as_fair_esm_does(model, label: str, sequence: str, layers) -> dict:
    """The content of the file that fair-esm's scripts/extract.py writes under `--include mean per_tok bos contacts`."""
    from esm import Alphabet

    _, (text,), tokens = Alphabet.from_architecture("ESM-1b").get_batch_converter(1022)([(label, sequence)])
    with torch.no_grad():
        out = model(tokens, repr_layers=list(layers), return_contacts=True)
    n = min(1022, len(text))
    return {
        "label": label,
        "representations": {layer: t[0, 1 : n + 1].clone() for layer, t in out["representations"].items()},
        "mean_representations": {layer: t[0, 1 : n + 1].mean(0).clone() for layer, t in out["representations"].items()},
        "bos_representations": {layer: t[0, 0].clone() for layer, t in out["representations"].items()},
        "contacts": out["contacts"][0, :n, :n].clone(),
    }


def tensors(content: dict) -> list[torch.Tensor]:
    values = [value for value in content.values() if not isinstance(value, str)]
    return [tensor for value in values for tensor in (value.values() if isinstance(value, dict) else [value])]


def assert_same_tensors(found, wanted) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_same_tensors(found[key], wanted[key])
        return
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_repeated_ids_have_files_of_their_own_and_the_index_says_whose(run, embeddings):
    with open(embeddings / "esm" / "x" / "index.tsv", newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    assert [row["id"] for row in rows] == IDS
    assert [row["record"] for row in rows] == [str(n + 1) for n in range(len(IDS))]
    names = [row["file"] for row in rows]
    assert len(set(names)) == len(IDS)
    assert [names[i] for i in (0, 2, 9, 10, 12)] == ["a.pt", "a~2.pt", "unnamed.pt", "b~2.pt", "a~2~2.pt"]
    assert {path.name for path in (embeddings / "esm" / "x").iterdir()} == {*names, "index.tsv"}


def test_formats_keyed_by_id_say_in_the_log_how_many_ids_repeat(run, caplog):
    with caplog.at_level(logging.WARNING):
        run.collect(["h5_per_protein", "h5ad", "esm"], "logged")
    for part in (
        "per_protein.h5: the ids of 4 records occurred before",
        "embeddings.h5ad: the ids of 3 records occurred before",
        "esm: the ids of 3 records occurred before",
    ):
        assert part in caplog.text


# Names


@pytest.mark.parametrize("identifier", [*IDS[:7], "%2F", "100%", "..", ".", "a\nb\t", "\x7f", "~", "日本"])
def test_a_safe_name_gives_its_id_back(identifier):
    name = safe_name(identifier)
    assert unquote(name) == identifier
    assert "/" not in name
    assert not name.startswith(".")
    assert name.isprintable()


def test_long_ids_that_begin_alike_have_short_names_that_differ():
    names = [safe_name("é" * 300 + end) for end in "ab"]
    assert names[0] != names[1]
    assert all(len(name.encode()) <= 200 for name in names)


def test_no_two_records_get_one_name_and_the_first_keeps_its_id():
    given: list[str] = []
    names = NameGiver(given.__contains__)
    for identifier in ["a", "a~2", "a", "a", "a~2", "b", "a"]:
        given.append(names.name(identifier))
    assert given == ["a", "a~2", "a~3", "a~4", "a~2~2", "b", "a~5"]
    assert names.repeated == 4


# What is asked for


@pytest.mark.parametrize(("name", "include"), [("h5ad", ["per_residue", "contacts"]), ("esm", ["logits"])])
def test_a_format_that_can_hold_nothing_of_what_is_included_is_refused_with_a_sentence(name, include):
    with pytest.raises(ValueError, match=f"formats: {name} holds .* and nothing of include: .*; leave {name} out") as e:
        check_formats(["h5", name], include)
    assert "h5_per_protein" in str(e.value)
    check_formats([name], [*include, "mean"])


def test_what_a_format_cannot_hold_is_named_in_the_log(run, caplog):
    with caplog.at_level(logging.WARNING):
        run.collect(["h5ad", "parquet"], "partly")
    held = "h5ad holds mean, bos, max, std, pseudo_perplexity only"
    assert f"{held}: without per_residue_layer{LAYER}, contacts, logits, entropy" in caplog.text
    assert "entropy, pseudo_perplexity only: without contacts" in caplog.text


# Precision


def test_pooled_vectors_are_rounded_in_every_format_and_nothing_else_is(run):
    embeddings = run.collect(list(FORMATS), "half", pooled_precision="fp16")
    for title, snippet in SNIPPETS.items():
        found: dict = {"embeddings": str(embeddings), "folder": f"{embeddings}/mean_layer{LAYER}"}
        exec(snippet, found)
        types = {str(np.asarray(vector).dtype) for vector in found["vectors"]}
        assert types == ({"float32"} if "per residue" in title else {"float16"})
    vectors = np.load(embeddings / f"mean_layer{LAYER}" / "embeddings.npy")
    exact = np.stack([vector for _, vector in expected(run, f"mean_layer{LAYER}")])
    assert np.array_equal(vectors, exact.astype(np.float16))
    types = {name: np.load(embeddings / name / "embeddings.npy").dtype for name in OUTPUTS.names()}
    assert {name for name, dtype in types.items() if dtype == np.float16} == {
        f"{kind}_layer{LAYER}" for kind in ("mean", "bos", "max", "std")
    }


def test_a_value_that_fp16_cannot_hold_ends_collect_with_the_record_s_name(tmp_path):
    outputs = Outputs((6,), ("mean",))
    sequences = proteins(3, 5, 9)
    segment = random_segment(sequences, outputs)
    for value in (65_519.0, -65_519.0):
        segment.arrays["mean_layer6"][1, 2] = value  # Rounds to the largest that there is.
        made = CollectedRun(tmp_path / f"{value}", as_records(sequences), [segment], outputs)
        vectors = np.load(made.collect(["npy"], pooled_precision="fp16") / "mean_layer6" / "embeddings.npy")
        assert abs(vectors[1, 2]) == 65_504
    for value in (65_521.0, -70_000.0):
        segment.arrays["mean_layer6"][1, 2] = value
        made = CollectedRun(tmp_path / f"{value}", as_records(sequences), [segment], outputs)
        with pytest.raises(CollectError, match=r"a\.fasta, record 2 \(p1\): mean_layer6 has a value beyond 65504"):
            made.collect(["npy", "h5"], pooled_precision="fp16")
        assert not list((tmp_path / f"{value}" / "results").rglob("embeddings.*"))
        assert made.collect(["npy"]).exists()


def as_records(sequences, file="a.fasta") -> list[MadeUpRecord]:
    return [MadeUpRecord(file, f"p{i}", sequence) for i, sequence in enumerate(sequences)]


# Size


@pytest.mark.parametrize("size", [1, 100, 3000])
def test_pieces_of_any_size_give_the_same_files(run, embeddings, monkeypatch, size):
    monkeypatch.setattr(streaming, "_PIECE_BYTES", size)
    again = run.collect(list(FORMATS), f"pieces of {size}")
    compared = 0
    for path in sorted(embeddings.rglob("*")):
        other = again / path.relative_to(embeddings)
        if path.suffix in (".npy", ".tsv", ".pt", ".npz", ".json"):
            assert content(path) == content(other)
            compared += 1
        elif path.suffix == ".parquet":
            assert pq.read_table(path).equals(pq.read_table(other))
            compared += 1
        elif path.suffix in (".h5", ".h5ad"):
            with h5py.File(path) as first, h5py.File(other) as second:
                assert datasets(first) == datasets(second)
            compared += 1
        else:
            assert path.is_dir()
    assert compared > 60


def content(path: Path):
    if path.suffix == ".npz":
        # The archive has the time of day in it.
        return {name: values.tobytes() for name, values in np.load(path).items()}
    if path.suffix != ".pt":
        return path.read_bytes()
    return repr(torch.load(path, weights_only=True))


def datasets(file: h5py.File) -> dict[str, str]:
    found = {}
    file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
    return {name: repr(item[()] if item.shape == () else item[:].tolist()) for name, item in found.items()}


@pytest.mark.parametrize("name", [*COLUMNAR, "skbio", "pt", "h5_per_protein"])
def test_memory_does_not_grow_with_the_vectors(tmp_path, monkeypatch, name):
    monkeypatch.setattr(streaming, "_PIECE_BYTES", 1 << 20)
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 1 << 20)
    outputs = Outputs((6,), ("mean",))
    sequences = proteins(800, 5, 9)
    parts = [sequences[start::6] for start in range(6)]
    segments = [random_segment(part, outputs, width=8192, seed=n) for n, part in enumerate(parts)]
    made = CollectedRun(tmp_path, as_records(sequences), segments, outputs)
    vectors = sum(segment.arrays["mean_layer6"].nbytes for segment in segments)
    del segments
    made.collect([name], "once")  # Imports are not what is counted.
    tracemalloc.start()
    try:
        made.collect([name])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert vectors > 24e6
    assert peak < 15e6


def test_a_streamed_pt_is_what_torch_itself_would_save(run, embeddings, tmp_path):
    path = embeddings / f"per_residue_layer{LAYER}" / "pt" / "x_ESM.pt"
    streamed = torch.load(path, weights_only=True)
    torch.save(streamed, tmp_path / "by_torch.pt")
    by_torch = torch.load(tmp_path / "by_torch.pt", weights_only=True)
    assert streamed["proteins"] == by_torch["proteins"]
    for first, second in zip(streamed["data"], by_torch["data"], strict=True):
        assert torch.equal(first, second)
        assert (first.stride(), first.storage_offset()) == (second.stride(), second.storage_offset())
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert all(torch.equal(first, second) for first, second in zip(streamed["data"], mapped["data"], strict=True))


def test_an_h5_of_half_precision_residues_keeps_them(tmp_path):
    outputs = Outputs((6,), ("per_residue",))
    sequences = proteins(3, 5, 9)
    whole = random_segment(sequences, outputs)
    half = {name: values.astype(np.float16) for name, values in whole.arrays.items()}
    segment = Segment(whole.digests, whole.lengths, half, "fp16")
    made = CollectedRun(tmp_path, as_records(sequences), [segment], outputs)
    folder = made.collect(["h5", "npy", "parquet", "pt"]) / "per_residue_layer6"
    with h5py.File(folder / "embeddings.h5") as file:
        assert np.array_equal(file["embeddings"][:], half["per_residue_layer6"])
    assert np.load(folder / "embeddings.npy").dtype == np.float16
    assert "halffloat" in str(pq.read_schema(folder / "embeddings.parquet"))
    assert torch.load(folder / "pt" / "a_ESM.pt", weights_only=True)["data"][0].dtype == torch.float16
