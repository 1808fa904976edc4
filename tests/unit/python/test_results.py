"""The results of a run in Python: the same vectors from every format, and sentences for what is not there."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from collected_run import CollectedRun, MadeUpRecord, random_segment
from made_up import proteins

import esmflow
from esmflow.arrays import INCLUDE, Array, Outputs
from esmflow.collect.formats import FORMATS
from esmflow.inputs.residues import sequence_digest

OUTPUTS = Outputs((1, 2), INCLUDE)
SEQUENCES = proteins(9, 3, 12)
# Two files of one stem, ids that are no file names, one that occurs twice, and one sequence that does.
RECORDS = [
    MadeUpRecord("one/a.faa", "sp|P12345|ONE", SEQUENCES[0]),
    MadeUpRecord("one/a.faa", "x/../y", SEQUENCES[1]),
    MadeUpRecord("one/a.faa", "twice", SEQUENCES[2]),
    MadeUpRecord("two/a.faa.gz", "twice", SEQUENCES[3]),
    MadeUpRecord("two/a.faa.gz", "gi|1|gb|AAA1.1|", SEQUENCES[0]),
    MadeUpRecord("b.faa", "ß", SEQUENCES[4]),
]


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    segments = [random_segment(SEQUENCES[:2], OUTPUTS, seed=1), random_segment(SEQUENCES[2:], OUTPUTS, seed=2)]
    run = CollectedRun(tmp_path_factory.mktemp("collected"), RECORDS, segments, OUTPUTS)
    for name in FORMATS:
        run.collect([name], name=f"out/{name}/results")
    found = [(segment, row) for segment in segments for row in range(len(segment))]
    place = {sequence: found[number] for number, sequence in enumerate(SEQUENCES)}

    def expected(record: MadeUpRecord, array: str) -> np.ndarray:
        segment, row = place[record.sequence]
        offsets = segment.offsets(array)
        values = segment.arrays[array][offsets[row] : offsets[row + 1]]
        return values[0] if Array.named(array).is_pooled else values

    return run.folder / "out", expected


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_every_vector_in_the_order_of_the_manifest(collected, name):
    folder, expected = collected
    results = esmflow.open(folder / name)
    assert results.ids == [record.id for record in RECORDS]
    held = [array for array in results.arrays if FORMATS[name].holds(Array.named(array))]
    assert held
    for array in held:
        values = [expected(record, array) for record in RECORDS]
        joined = np.stack(values) if Array.named(array).is_pooled else np.concatenate(values)
        np.testing.assert_array_equal(results.matrix(array).reshape(joined.shape), joined)
        if Array.named(array).is_pooled:
            vectors = esmflow.open(folder / name, array=array)
            np.testing.assert_array_equal(vectors["P12345"], values[0])
            np.testing.assert_array_equal(vectors["ß"], values[-1])
        else:
            found = results.per_residue("x/../y", array)
            residues = len(RECORDS[1].sequence)
            assert found.shape[0] == residues
            assert array != "contacts" or found.shape == (residues, residues)
            np.testing.assert_array_equal(found.reshape(values[1].shape), values[1])


@pytest.mark.parametrize("name", FORMATS)
def test_results_without_embeddings_can_be_opened_in_every_format(tmp_path, name):
    run = CollectedRun(tmp_path, RECORDS[:2], [], OUTPUTS)
    failed = [f"{sequence_digest(record.sequence).hex()}\tnon_finite\t\n" for record in RECORDS[:2]]
    (tmp_path / "failures.tsv").write_text("digest\treason\tdetail\n" + "".join(failed))
    run.collect([name], name="out/results")
    results = esmflow.open(tmp_path / "out")
    assert results.ids == []
    for array in results.arrays:
        if FORMATS[name].holds(Array.named(array)):
            assert results.matrix(array).size == 0


def test_a_number_for_each_protein_is_no_vector(collected):
    results = esmflow.open(collected[0] / "npy", array="pseudo_perplexity")
    assert results[RECORDS[0].id].shape == ()
    assert results.matrix().shape == (len(RECORDS),)
    for no_vectors in (lambda: results.nearest(RECORDS[0].id), results.to_anndata):
        with pytest.raises(esmflow.ResultsError, match="pseudo_perplexity is a number and no vector; open the results"):
            no_vectors()


def test_variants_are_a_table_where_the_run_had_one(collected):
    results = esmflow.open(collected[0] / "npy")
    with pytest.raises(esmflow.ResultsError, match="has no variants; name a table of them under variants"):
        results.variants  # noqa: B018
    written = pl.DataFrame({"id": ["a"], "variant": ["A1C"], "masked_marginal": [-1.5]})
    written.write_parquet(results.folder / "variants.parquet")
    assert results.variants.equals(written)


def test_a_matrix_in_npy_is_mapped(collected):
    assert isinstance(esmflow.open(collected[0] / "npy").matrix(), np.memmap)


def test_vectors_come_from_the_first_format_that_is_there(collected, tmp_path):
    folder, _ = collected
    (tmp_path / "embeddings").symlink_to(folder / "npy/results/embeddings")
    for name in ("manifest.parquet", "summary.json"):
        text = (folder / "npy/results" / name).read_bytes()
        (tmp_path / name).write_bytes(text.replace(b'"npy"', b'"h5", "npy"') if name == "summary.json" else text)
    assert isinstance(esmflow.open(tmp_path).matrix(), np.memmap)
    (tmp_path / "embeddings").unlink()
    with pytest.raises(esmflow.ResultsError, match="mean_layer2 is in no file of h5, npy; run it again"):
        esmflow.open(tmp_path).matrix()


def test_the_default_is_the_last_layers_mean(collected):
    assert esmflow.open(collected[0] / "h5").array == "mean_layer2"


def test_an_array_that_no_format_could_hold_is_said_to_be_nowhere(collected):
    with pytest.raises(esmflow.ResultsError, match=r"contacts is in no file of h5ad; put one of h5, .* into formats"):
        esmflow.open(collected[0] / "h5ad").matrix("contacts")


def test_a_repeated_id_is_an_error_that_names_the_rows(collected):
    results = esmflow.open(collected[0] / "h5")
    with pytest.raises(
        esmflow.ResultsError, match=r"2 records have the id twice: row 2 \(record 3 of one/a.faa\), row 3"
    ):
        results["twice"]
    assert "twice" in results


def test_what_is_not_there_is_said_in_a_sentence(collected):
    results = esmflow.open(collected[0] / "h5")
    with pytest.raises(KeyError, match="has no record missing; its ids are such as"):
        results["missing"]
    with pytest.raises(esmflow.ResultsError, match="3 is no id"):
        results[3]
    with pytest.raises(esmflow.ResultsError, match="has no mean_layer9; it has mean_layer1"):
        results.matrix("mean_layer9")
    with pytest.raises(esmflow.ResultsError, match="there is no such folder"):
        esmflow.open(collected[0] / "nowhere")
    with pytest.raises(esmflow.ResultsError, match="no results of a finished run"):
        esmflow.open(collected[0])


@pytest.mark.parametrize("query", ["P12345", "vector"])
def test_the_nearest_are_those_of_the_largest_cosine(collected, query):
    results = esmflow.open(collected[0] / "h5")
    unit = results.matrix() / np.linalg.norm(results.matrix(), axis=1, keepdims=True)
    cosines = unit @ unit[0]
    rows = [row for row in np.argsort(-cosines, kind="stable").tolist() if query == "vector" or row != 0][:3]
    found = results.nearest(results.matrix()[0] if query == "vector" else query, k=3)
    np.testing.assert_allclose(found["cosine"], cosines[rows], atol=1e-6)
    assert found["id"].to_list() == [results.ids[row] for row in found["row"]]
    assert len(results.nearest("P12345", k=100)) == len(RECORDS) - 1


def test_an_anndata_has_what_the_manifest_knows_and_names_that_differ(collected):
    proteins = esmflow.open(collected[0] / "h5").to_anndata()
    assert proteins.obs_names.is_unique
    assert proteins.obs["id"].to_list() == [record.id for record in RECORDS]
    np.testing.assert_array_equal(proteins.X, esmflow.open(collected[0] / "h5").matrix())
