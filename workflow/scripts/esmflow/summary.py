"""The few lines that a run ends with on the terminal."""

from __future__ import annotations

from typing import Any

from esmflow.failures import REMEDY, Reason


def summary_lines(summary: dict[str, Any], model: str, embeddings: str, manifest: str, failures: str) -> list[str]:
    """What a person wants to know at the end: how many of what, how fast, where, and what to do about failures."""
    without = summary["records"] - summary["embedded"]
    lines = [
        f"model      {model}",
        f"records    {summary['records']:,}: {summary['embedded']:,} embedded, "
        f"{summary['rejected']:,} rejected, {summary['failed']:,} failed",
        f"duplicates {summary['duplicates']:,} records share the embedding of an equal sequence",
    ]
    if summary["truncated"]:
        lines.append(f"truncated  {summary['truncated']:,} records, marked in the manifest")
    if summary["windowed"]:
        lines.append(f"windowed   {summary['windowed']:,} records, marked in the manifest")
    for reason, count in summary["reasons"].items():
        lines.append(f"           {count:,} × {reason}: {REMEDY[Reason(reason)]}")
    if summary["residues_per_second"]:
        lines.append(
            f"speed      {summary['residues_per_second']:,.0f} residues/s over {summary['seconds']:,.0f} s "
            f"({summary['computed_sequences']:,} sequences computed)"
        )
    else:
        lines.append("speed      nothing had to be computed")
    lines.append(f"results    {embeddings}  ({', '.join(summary['arrays'])}; {', '.join(summary['formats'])})")
    lines.append(f"manifest   {manifest}")
    if without:
        lines.append(f"failures   {failures}  (every record without an embedding, and why)")
    return lines
