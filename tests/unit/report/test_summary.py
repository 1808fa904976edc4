"""The lines that a run ends with: few, and with the next thing to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from esmflow.collect.summary import Summary
from esmflow.report.summary import Places, command_of, summary_lines
from esmflow.verify.agreement import Agreement
from esmflow.verify.certificate import Certificate, OutputAgreement, Remedy, VerifiedSequence

PLACES = Places(
    "results/embeddings",
    "results/manifest.parquet",
    "results/report.html",
    "results/failures.tsv",
    "snakemake --cores 8",
)
PLAIN = Summary(
    records=1200,
    embedded=1200,
    failed=0,
    rejected=0,
    computed_sequences=1200,
    seconds=60.0,
    residues_per_second=100_000.0,
    seconds_with_start_up=75.0,
    residues_per_second_with_start_up=80_000.0,
    formats=("h5",),
    arrays=("mean_layer36",),
)
REASONS = {"empty_sequence": 1, "invalid_residue": 5, "too_long": 4, "non_finite": 2, "out_of_memory": 3}
MANY = replace(PLAIN, embedded=1185, rejected=10, failed=5, reasons=REASONS, duplicates=7, truncated=2)
OUTPUT = OutputAgreement(32, 0.99921, 0.9999, 0.04, 0.001, 1.0)
SEQUENCE = VerifiedSequence(
    digest="", file="a.faa", record=1, id="p", length=10, precision="fp16", segment="", row=0, position=0, passed=True,
    outputs={},
)  # fmt: skip
PASSED = Certificate(passed=True, computed_again=32, outputs={"mean_layer36": OUTPUT}, sequences=(SEQUENCE,) * 32)
NOT_PASSED = replace(PASSED, passed=False, remedy=Remedy.RECOMPUTE, segments=("store/a b.safetensors",))


def lines(summary=PLAIN, certificate=PASSED):
    return summary_lines(summary, certificate, "esm2_t36_3B_UR50D", PLACES)


@pytest.mark.parametrize("summary", [PLAIN, MANY])
@pytest.mark.parametrize("certificate", [None, PASSED, NOT_PASSED])
def test_a_summary_has_five_to_ten_lines(summary, certificate):
    assert 5 <= len(lines(summary, certificate)) <= 10


def test_nothing_is_left_to_do_after_a_run_without_failures():
    assert not [line for line in lines() if line.startswith(("next", "failures"))]
    assert lines()[0] == "records    1,200: 1,200 embedded, 0 rejected, 0 failed"


def test_the_speed_says_what_it_is_of():
    (line,) = [line for line in lines() if line.startswith("speed")]
    said = "100,000 residues/s while embedding (60 s), 80,000 with start-up (75 s); 1,200 sequences computed"
    assert line == f"speed      esm2_t36_3B_UR50D: {said}"


def test_the_certificate_is_one_line():
    (line,) = [line for line in lines() if line.startswith("verified")]
    assert line.endswith(
        "32 sequences computed again with fair-esm in fp32: lowest cosine 0.999210, largest relative error 4.0e-02"
    )
    assert "verified   no (verify.sample: 0)" in lines(certificate=None)
    before = replace(PASSED, computed_again=0, verified_before=32)
    assert "0 sequences computed again with fair-esm in fp32, 32 verified by an earlier run: lowest" in before.line()


def test_a_certificate_over_nothing_is_neither_passed_nor_failed():
    found = lines(certificate=Certificate(passed=None))
    assert "verified   NOT VERIFIED: no embedding was computed again" in found
    assert not [line for line in found if line.startswith("next")]


def test_the_commonest_reasons_are_named_with_their_remedies_and_the_others_counted():
    text = "\n".join(lines(MANY))
    assert text.index("5 × invalid_residue: correct") < text.index("4 × too_long") < text.index("3 × out_of_memory")
    assert "and 3 for other reasons" in text
    assert "(7 share the embedding of an equal sequence, 2 truncated)" in text


def test_the_last_line_is_the_exact_command_to_try_failures_again_with():
    assert lines(MANY)[-1] == "next       try the failed records again: snakemake --cores 8 --forcerun plan"
    rejected = replace(MANY, failed=0, reasons={"empty_sequence": 15})
    assert lines(rejected)[-1].endswith("then run: snakemake --cores 8")


@pytest.mark.parametrize(
    ("remedy", "ending"),
    [
        ("recompute", "rm 'store/a b.safetensors' && snakemake --cores 8 --forcerun plan"),
        ("collect", "snakemake --cores 8 --forcerun collect"),
        ("another_way", "set engine: reference in the configuration, then run: snakemake --cores 8"),
    ],
)
def test_a_certificate_that_is_not_passed_comes_first_with_what_mends_it(remedy, ending):
    found = lines(MANY, replace(NOT_PASSED, remedy=remedy, engine="packed"))
    assert found[-1].startswith("next       do not use these embeddings; ")
    assert found[-1].endswith(ending)
    assert any("verified   NOT PASSED" in line for line in found)


def test_the_first_problems_are_named_and_the_others_counted():
    problems = tuple(f"problem {n}" for n in range(9))
    assert replace(NOT_PASSED, problems=problems).problem_lines() == [*problems[:3], "and 6 more"]
    assert replace(NOT_PASSED, problems=problems[:1]).problem_lines() == [*problems[:1]]


def test_a_command_is_shown_as_it_was_typed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    at = str(tmp_path / ".venv" / "bin")
    options = ["--cores", "8", "--config", "samples=my files/*.faa"]
    typed = ".venv/bin/snakemake --cores 8 --config 'samples=my files/*.faa'"
    assert command_of([f"{at}/python3", f"{at}/snakemake", *options]) == typed
    assert command_of([f"{at}/python3", "-m", "snakemake", "-n"]) == ".venv/bin/python3 -m snakemake -n"
    assert command_of([f"{at}/python3", "-Pm", "snakemake", "-n"]) == ".venv/bin/python3 -Pm snakemake -n"
    assert command_of(["/opt/python3", "/opt/snakemake"]) == "/opt/snakemake"
    assert command_of([]) == "snakemake"
    program = tmp_path / "snakemake"
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command_of(["/opt/python3", str(program), "-n"]) == "snakemake -n"


@pytest.mark.parametrize(
    ("precision", "cosine", "said"), [("bf16", 0.9994, True), ("bf16", 0.9996, False), ("int8", 0.998, False)]
)
def test_a_low_cosine_in_bf16_names_what_is_nearer(precision, cosine, said):
    sequence = replace(SEQUENCE, precision=precision, outputs={"mean_layer6": Agreement(cosine, 0.03, 1.0)})
    found = lines(certificate=replace(PASSED, sequences=(sequence,)))
    assert any("set precision: fp16" in line for line in found) == said
