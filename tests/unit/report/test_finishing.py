"""How a run ends: with a summary, or with an error that says why, and without what an earlier run left."""

from __future__ import annotations

from dataclasses import replace

import pytest

from esmflow.collect.summary import Summary, VariantSummary
from esmflow.embedding.run_record import RunRecord
from esmflow.report.finishing import FinishError, FinishSettings, finish
from esmflow.report.summary import Places

GOOD = Summary(
    records=10,
    embedded=10,
    failed=0,
    rejected=0,
    computed_sequences=10,
    seconds=60.0,
    residues_per_second=100.0,
    seconds_with_start_up=75.0,
    residues_per_second_with_start_up=80.0,
    formats=("h5",),
    arrays=("mean_layer6",),
)
REJECTED = replace(GOOD, embedded=9, rejected=1, reasons={"empty_sequence": 1})


@pytest.fixture
def settings(tmp_path) -> FinishSettings:
    """The end of a run of one group, under the policy `report`, without a certificate or a report."""
    RunRecord(group="0").write(tmp_path / "run.json")
    places = Places("embeddings", "manifest.parquet", None, "failures.tsv", "snakemake --cores 8")
    return FinishSettings(
        summary=str(tmp_path / "summary.json"),
        certificate=None,
        runs=[str(tmp_path / "run.json")],
        model="esm2_t6_8M_UR50D",
        places=places,
        fail_without_embedding=False,
        output=str(tmp_path / "summary.txt"),
        variants=None,
        logs=[],
        joined_log=str(tmp_path / "run.log"),
        shows_summary=False,
    )


@pytest.fixture
def end(settings, tmp_path):
    """Ends a run with a summary, and returns what it ended with."""

    def end(summary: Summary, **changes) -> str:
        summary.write(settings.summary)
        finish(replace(settings, **changes))
        return (tmp_path / "summary.txt").read_text()

    return end


def test_a_rejected_record_is_a_line_of_the_summary_and_an_error_only_if_asked_for(end, tmp_path):
    assert "1 × empty_sequence" in end(REJECTED)
    (tmp_path / "summary.txt").unlink()
    with pytest.raises(FinishError, match=r"1 × empty_sequence(.|\n)*1 records have no embedding; mend the input"):
        end(REJECTED, fail_without_embedding=True)
    assert not (tmp_path / "summary.txt").exists()
    # Nothing that another run of the group could change.
    assert (tmp_path / "run.json").exists()
    end(GOOD, fail_without_embedding=True)


def test_a_run_that_embeds_nothing_ends_with_an_error_unless_its_inputs_are_empty(end):
    empty = replace(GOOD, records=1, embedded=0, rejected=1, reasons={"empty_file": 1})
    assert "1 × empty_file" in end(empty)
    end(replace(GOOD, records=0, embedded=0))
    both = replace(empty, records=3, rejected=3, reasons={"empty_file": 1, "invalid_residue": 2})
    with pytest.raises(FinishError, match=r"none of 2 records; failures\.tsv says why of each"):
        end(both)


def test_a_certificate_and_a_report_of_an_earlier_run_do_not_stay_beside_one_without(end, settings, tmp_path):
    earlier = [tmp_path / name for name in ("certificate.json", "report.html", "report/flow.svg")]
    (tmp_path / "report").mkdir()
    for path in earlier:
        path.touch()
    end(GOOD, places=replace(settings.places, report=str(tmp_path / "report.html")))
    assert [path.exists() for path in earlier] == [False, True, True]
    assert "verified   no (verify.sample: 0)" in end(GOOD)
    assert not any(path.exists() for path in (*earlier, tmp_path / "report"))


def test_variants_are_a_line_of_the_summary_and_those_of_an_earlier_run_do_not_stay_beside_none(end, tmp_path):
    earlier = [tmp_path / f"variants.{suffix}" for suffix in ("json", "parquet", "tsv")]
    for path in earlier:
        path.touch()
    VariantSummary(5, 3, {"unknown_id": 2}).write(earlier[0])
    said = end(GOOD, variants=str(earlier[0]))
    assert "variants   5: 3 scored, 2 without a score (2 × unknown_id); variants.tsv" in said
    assert all(path.exists() for path in earlier)
    assert "variants" not in end(GOOD)
    assert not any(path.exists() for path in earlier)
