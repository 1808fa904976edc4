"""The verdict on a sample that was computed again: what is wrong, with which sequences, and what would mend it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from statistics import median
from typing import Any

from esmflow.store.segments import Store
from esmflow.verify.agreement import Agreement, Limits, common_fault
from esmflow.verify.manifest_check import ManifestCheck
from esmflow.verify.read_back import Sampled
from esmflow.verify.worker import Verified


class Remedy(StrEnum):
    """What would mend embeddings that are wrong: collect them again from the store, compute some segments again, or
    compute all of them in another way."""

    COLLECT = "collect"
    RECOMPUTE = "recompute"
    ANOTHER_WAY = "another_way"


def judge(
    sampled: Sequence[Sampled],
    verified: Verified,
    check: ManifestCheck,
    arrays: Sequence[str],
    limits_of: Callable[[str], Limits],
    store: Store,
) -> dict[str, Any]:
    """The part of the certificate that says what was found.

    limits_of: the limits for a precision. Keys: `passed`, `problems` (sentences), `remedy` and `segments` (the files
    to which it applies), `outputs` (figures by array) and `sequences`.
    """
    problems = [_misplaced(check)] if check.misplaced else []
    sequences = [_sequence(number, sampled, verified, limits_of) for number in range(len(sampled))]
    failing = [entry for entry in sequences if entry["passed"] is False]
    problems += [_sentence(entry, limits_of) for entry in failing]
    outputs: dict[str, Any] = {}
    common = []
    for name in arrays:
        found = [(s, a[name]) for s, a in zip(sampled, verified.agreements, strict=True) if a and name in a]
        if not found:
            continue
        agreements = [agreement for _, agreement in found]
        outputs[name] = _figures(agreements)
        # Of several precisions the loosest, since this is about all sequences together.
        loosest = max((limits_of(record.precision) for record, _ in found), key=lambda limits: limits.scale)
        if fault := common_fault(agreements, loosest):
            common.append(f"{name}: {fault}")
    segments = sorted({str(store.path(entry["segment"])) for entry in failing if not entry["differs_from_store"]})
    return {
        "passed": not problems and not common,
        "problems": [*common, *problems],
        "remedy": _remedy(bool(common), bool(segments), bool(problems)),
        "segments": segments,
        "outputs": outputs,
        "sequences": sequences,
    }


def _remedy(common: bool, segments: bool, problems: bool) -> Remedy | None:
    if common:
        return Remedy.ANOTHER_WAY
    if segments:
        return Remedy.RECOMPUTE
    return Remedy.COLLECT if problems else None


def _misplaced(check: ManifestCheck) -> str:
    return (
        f"{check.misplaced} of {check.records} records point to a row of the store that is another sequence's: "
        f"{'; '.join(check.examples)}"
    )


def _sequence(
    number: int, sampled: Sequence[Sampled], verified: Verified, limits_of: Callable[[str], Limits]
) -> dict[str, Any]:
    """What the certificate says of one sequence. `passed` is None if it could not be computed again."""
    record, agreements = sampled[number], verified.agreements[number]
    limits, differs = limits_of(record.precision), number in verified.differ
    failing = [name for name, agreement in (agreements or {}).items() if not limits.allow(agreement)]
    other = verified.resembles.get(number) if failing else None
    return {
        **{key: value for key, value in asdict(record).items() if key not in ("sequence", "position_in_file")},
        "passed": None if agreements is None and not differs else not failing and not differs,
        "outputs": {name: asdict(agreement) for name, agreement in (agreements or {}).items()},
        "failing": failing,
        "differs_from_store": differs,
        "resembles": None if other is None else _name(asdict(sampled[other])),
    }


def _sentence(entry: Mapping[str, Any], limits_of: Callable[[str], Limits]) -> str:
    """One sequence that did not pass."""
    limits = limits_of(entry["precision"])
    sentence = f"{_name(entry)}: "
    if not entry["failing"]:
        return f"{sentence}the files hold another embedding than the store"
    worst = min(entry["failing"], key=lambda name: entry["outputs"][name]["cosine"])
    agreement = entry["outputs"][worst]
    sentence += (
        f"{worst} has cosine {agreement['cosine']:.6f} (at least {limits.min_cosine}) and relative error "
        f"{agreement['relative_error']:.2e} (at most {limits.max_relative_error}) to fair-esm in fp32"
    )
    if entry["resembles"]:
        sentence += f"; it is the vector of {entry['resembles']}"
    elif agreement["nearer_to"]:
        sentence += f"; it is nearer to {agreement['nearer_to']}"
    return f"{sentence}; the store holds another" if entry["differs_from_store"] else sentence


def _name(record: Mapping[str, Any]) -> str:
    return f"{record['file']}, record {record['record']} ({record['id']})"


def _figures(agreements: Sequence[Agreement]) -> dict[str, Any]:
    cosines = [agreement.cosine for agreement in agreements]
    errors = [agreement.relative_error for agreement in agreements]
    return {
        "sequences": len(agreements),
        "cosine_min": min(cosines),
        "cosine_median": median(cosines),
        "relative_error_max": max(errors),
        "relative_error_median": median(errors),
        "scale_median": median(agreement.scale for agreement in agreements),
    }
