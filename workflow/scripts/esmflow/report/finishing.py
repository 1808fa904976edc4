"""The end of a run: its summary in words, and the reasons to end it with an error."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esmflow.collect.summary import Summary, VariantSummary
from esmflow.embedding.run_record import RunRecord
from esmflow.errors import EsmflowError
from esmflow.failures import Reason
from esmflow.files import atomic_path
from esmflow.logs import join_logs, tell
from esmflow.report.summary import Places, summary_lines
from esmflow.verify.certificate import Certificate

log = logging.getLogger(__name__)


class FinishError(EsmflowError):
    """A run that was asked to end with an error, or that nobody should use. The message is its summary, and why."""


@dataclass(frozen=True, kw_only=True)
class FinishSettings:
    """How to end a run.

    summary, certificate, variants, runs: files that earlier steps left; certificate, variants: None without any.
    model: its name.
    places: where the results are. fail_without_embedding: whether records without an embedding are an error.
    output: the file to write. logs: files to be joined to one, joined_log. shows_summary: whether to print it.
    """

    summary: str
    certificate: str | None
    variants: str | None
    runs: Sequence[str]
    model: str
    places: Places
    fail_without_embedding: bool
    output: str
    logs: Sequence[str]
    joined_log: str
    shows_summary: bool


def finish(settings: FinishSettings) -> None:
    """Writes the summary in words, or raises FinishError after which the same command tries what failed again."""
    summary = Summary.read(settings.summary)
    certificate = Certificate.read(settings.certificate) if settings.certificate else None
    variants = VariantSummary.read(settings.variants) if settings.variants else None
    lines = summary_lines(summary, certificate, settings.model, settings.places, variants)
    _remove_earlier(settings)
    join_logs([Path(path) for path in settings.logs], settings.joined_log)
    ends = []
    if certificate and certificate.passed is False:
        ends += [f"the certificate was not passed ({settings.certificate}):", *certificate.problem_lines()]
    with_content = summary.records - summary.reasons.get(Reason.EMPTY_FILE, 0)
    if with_content and not summary.embedded:
        ends.append(
            f"nothing was embedded: none of {with_content} records; {settings.places.failures} says why of each"
        )
    without = summary.records - summary.embedded
    if settings.fail_without_embedding and without:
        # A group without its run.json is one that Snakemake runs again; the shards that succeeded are in the store.
        for run in settings.runs:
            if RunRecord.read(run).failed_sequences:
                Path(run).replace(Path(run).with_name("failed-run.json"))
        again = "the same command again tries the failed shards once more" if summary.failed else "mend the input"
        ends.append(f"failures.policy is error and {without} records have no embedding; {again}")
    if ends:
        raise FinishError("\n".join([*lines, *ends]))
    with atomic_path(settings.output) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if settings.shows_summary:
        tell("the run has ended\n" + "\n".join(lines))


def _remove_earlier(settings: FinishSettings) -> None:
    """Removes a certificate or report that an earlier run left and this one has not: it may be about other results."""
    results = Path(settings.summary).parent
    if settings.certificate is None and (results / "certificate.json").exists():
        (results / "certificate.json").unlink()
        log.info("removed %s/certificate.json of an earlier run (verify.sample: 0)", results)
    if settings.places.report is None and (results / "report.html").exists():
        (results / "report.html").unlink()
        shutil.rmtree(results / "report", ignore_errors=True)
        log.info("removed %s/report.html of an earlier run (report: false)", results)
    if settings.variants is None and (results / "variants.json").exists():
        for suffix in ("parquet", "tsv", "json"):
            (results / f"variants.{suffix}").unlink(missing_ok=True)
        log.info("removed %s/variants.* of an earlier run (variants: null)", results)
