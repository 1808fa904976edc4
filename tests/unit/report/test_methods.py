"""The paragraph for a paper says what was done, and nothing that was not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from esmflow.checkpoint.file import CheckpointInfo
from esmflow.checkpoint.models import ModelDimensions
from esmflow.collect.summary import Summary, VariantSummary
from esmflow.embedding.run_record import LeasedSlot, RunRecord, WorkerRecord
from esmflow.method import Fingerprint
from esmflow.report.manifest_counts import ManifestCounts
from esmflow.report.methods import methods_paragraph
from esmflow.report.run_files import RunFiles
from esmflow.report.sections import what_ran
from esmflow.store.segments import Store
from esmflow.verify.certificate import Certificate, OutputAgreement

FINGERPRINT = Fingerprint(
    checkpoint="0", layers=(11, 12), include=("mean", "contacts"), per_residue_precision=None, engine="packed",
    arithmetic="", precision="auto", long_sequences="window", max_residues=1022, window_overlap=200,
    invalid_residues="reject",
)  # fmt: skip
SUMMARY = Summary(records=1200, embedded=1190, failed=0, rejected=10, windowed=3, versions={"torch": "2.13.0"})
COUNTS = ManifestCounts(precisions=Counter(fp16=1190), reasons=Counter(invalid_residue=10))
CERTIFICATE = Certificate(passed=True, outputs={"mean_layer12": OutputAgreement(2, 0.99998, 1.0, 0.01, 0.01, 1.0)})


@pytest.fixture
def paragraph(tmp_path):
    def made(summary=SUMMARY, certificate=CERTIFICATE, counts=COUNTS, variants=None, make=methods_paragraph):
        workers = [WorkerRecord(LeasedSlot(str(n), f"GPU-{n}", "NVIDIA H100", "cuda"), 0.0, 1.0) for n in range(2)]
        files = RunFiles(
            results="", manifest="", embeddings="", checkpoint="", fingerprint=FINGERPRINT, summary=summary,
            model=CheckpointInfo("esm2_t12", "", "", "", ModelDimensions(12, 480, 20, False, False)),
            store=Store(tmp_path, FINGERPRINT), runs=[RunRecord(group="0", host="a", workers=tuple(workers))],
            stored_segments=(), certificate=certificate, variants=variants, command="snakemake", configuration={},
            finished=0.0,
        )  # fmt: skip
        return make(files, counts)

    return made


def test_what_was_done_is_said_in_whole_sentences(paragraph):
    text = paragraph()
    assert "ESM-2 (Lin et al., 2023; checkpoint esm2_t12)" in text
    assert "it computed the mean over its residues of layers 11 and 12 and predicted contacts." in text
    assert "Computing was in fp16 with the packed engine on 2 × NVIDIA H100 and PyTorch 2.13.0." in text
    assert "3 sequences of more than 1,022 residues were embedded in windows that overlap by 200 residues." in text
    assert "Of 1,200 records 1,190 were embedded and 10 were not (invalid residue: 10)." in text
    assert text.endswith("the lowest cosine similarity was 0.999980.")


def test_what_was_not_done_is_not_said(paragraph):
    plain = replace(SUMMARY, embedded=1200, rejected=0, windowed=0, versions={})
    text = paragraph(plain, None, ManifestCounts(precisions=Counter(fp32=1200)))
    assert "windows" not in text
    assert "cosine" not in text
    assert "PyTorch" not in text
    assert text.endswith("Of 1,200 records 1,200 were embedded.")
    assert "Meier" not in text
    assert "3 variants had wild-type and masked marginals (Meier" in paragraph(variants=VariantSummary(4, 3))
    facts = dict(paragraph(variants=VariantSummary(4, 3, {"unknown_id": 1}), make=what_ran).facts)
    assert facts["Variants"] == "4: 3 scored, 1 without a score (1 × unknown_id)"
    assert "cosine" not in paragraph(certificate=replace(CERTIFICATE, passed=False))
