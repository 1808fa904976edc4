"""What the report says first: what came of the run, and the numbers at the top."""

from __future__ import annotations

from collections import Counter

from esmflow.manifest_counts import ManifestCounts
from esmflow.run_files import RunFiles
from esmflow.words import duration, percent, plural


def headline(files: RunFiles) -> str:
    """What came of the run, in one sentence."""
    summary = files.summary
    if summary["embedded"] == summary["records"]:
        return f"All {summary['records']:,} records have an embedding"
    return f"{summary['embedded']:,} of {summary['records']:,} records have an embedding"


def key_numbers(files: RunFiles, counts: ManifestCounts) -> list[tuple[str, str, str]]:
    """The numbers at the top: name, value, and a few words that explain it."""
    summary, slots = files.summary, files.slots()
    share = summary["embedded"] / summary["records"] if summary["records"] else 1.0
    numbers = [
        ("Records", f"{summary['records']:,}", plural(len(counts.files), "input file")),
        ("Embedded", f"{summary['embedded']:,}", f"{percent(share)} of the records"),
        (
            "Without embedding",
            f"{summary['rejected'] + summary['failed']:,}",
            f"{summary['rejected']:,} rejected, {summary['failed']:,} failed",
        ),
    ]
    if summary["residues_per_second"]:
        computed = f"{plural(summary['computed_sequences'], 'sequence')} in {duration(summary['seconds'])}"
        numbers.append(("Residues per second", f"{summary['residues_per_second']:,.0f}", computed))
        jobs = plural(sum(bool(run["workers"]) for run in files.runs), "job")
        numbers.append(("Slots", f"{len(slots)}", f"{jobs} on {devices(files)}"))
    else:
        numbers.append(("Computed", "0", why_nothing(files)))
    if files.certificate is None:
        numbers.append(("Certificate", "none", "verification was off"))
    else:
        verdict = "passed" if files.certificate["passed"] else "not passed"
        numbers.append(("Certificate", verdict, f"by {plural(len(files.certificate['sequences']), 'sequence')}"))
    return numbers


def devices(files: RunFiles) -> str:
    """The devices that were leased, with their numbers."""
    names = Counter(str(slot["name"]) for _, slot in files.slots())
    return ", ".join(f"{number} × {name}" for name, number in names.items()) or "no device"


def why_nothing(files: RunFiles) -> str:
    """Why a run computed nothing."""
    return "everything was in the store" if files.summary["embedded"] else "no record could be computed"
