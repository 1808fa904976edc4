"""The verdict on a sample that was computed again: what is wrong, with which sequences, and what would mend it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from esmflow.store.segments import Store
from esmflow.verify.agreement import MEDIAN_SHARE, Agreement, Limits, common_fault
from esmflow.verify.certificate import OutputAgreement, Remedy, VerifiedSequence
from esmflow.verify.manifest_check import ManifestCheck
from esmflow.verify.read_back import Sampled
from esmflow.verify.worker import Verified


@dataclass(frozen=True)
class Verdict:
    """The part of the certificate that says what was found; see `Certificate`."""

    passed: bool | None
    problems: tuple[str, ...]
    remedy: Remedy | None
    segments: tuple[str, ...]
    outputs: dict[str, OutputAgreement]
    not_verified: tuple[str, ...]
    sequences: tuple[VerifiedSequence, ...]


def judge(
    sampled: Sequence[Sampled],
    verified: Verified,
    check: ManifestCheck,
    arrays: Sequence[str],
    limits_of: Callable[[str], Limits],
    store: Store,
) -> Verdict:
    """Says what is wrong with a sample, `limits_of` being the limits for a precision."""
    problems = [_misplaced(check)] if check.misplaced else []
    names = {record.digest: record.name for record in sampled}
    sequences = tuple(_sequence(record, verified, limits_of(record.precision), names) for record in sampled)
    failing = [sequence for sequence in sequences if sequence.passed is False]
    problems += [_sentence(sequence, limits_of(sequence.precision)) for sequence in failing]
    outputs: dict[str, OutputAgreement] = {}
    common = []
    for name in arrays:
        found = [sequence for sequence in sequences if name in sequence.outputs]
        if not found:
            continue
        agreements = [sequence.outputs[name] for sequence in found]
        outputs[name] = _figures(agreements)
        # Of several precisions the loosest, since this is about all sequences together.
        loosest = max((limits_of(sequence.precision) for sequence in found), key=lambda limits: limits.scale)
        if name == "pseudo_perplexity":
            # One number differs from another in nothing but its scale.
            loosest = replace(loosest, scale=MEDIAN_SHARE * loosest.max_relative_error)
        if fault := common_fault(agreements, loosest):
            common.append(f"{name}: {fault}")
    segments = sorted({str(store.path(s.segment)) for s in failing if not s.differs_from_store})
    # Nothing wrong was found where nothing was looked at: that is no pass.
    passed = None if not (problems or common or outputs) else not (problems or common)
    return Verdict(
        passed=passed,
        problems=(*common, *problems),
        remedy=_remedy(bool(common), bool(segments), bool(problems)),
        segments=tuple(segments),
        outputs=outputs,
        not_verified=tuple(name for name in arrays if name not in outputs),
        sequences=sequences,
    )


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


def _sequence(record: Sampled, verified: Verified, limits: Limits, names: Mapping[str, str]) -> VerifiedSequence:
    """What the certificate says of one sequence. names: of all that were sampled, by digest."""
    agreements, differs = verified.agreements.get(record.digest), record.digest in verified.differ
    failing = tuple(name for name, agreement in (agreements or {}).items() if not limits.allow(agreement))
    other = verified.resembles.get(record.digest) if failing else None
    return VerifiedSequence(
        digest=record.digest,
        file=record.file,
        record=record.record,
        id=record.id,
        length=record.length,
        precision=record.precision,
        segment=record.segment,
        row=record.row,
        position=record.position,
        passed=None if agreements is None and not differs else not failing and not differs,
        outputs=agreements or {},
        failing=failing,
        differs_from_store=differs,
        resembles=None if other is None else names[other],
        verified_before=record.digest in verified.before,
    )


def _sentence(sequence: VerifiedSequence, limits: Limits) -> str:
    """One sequence that did not pass."""
    sentence = f"{sequence.name}: "
    if not sequence.failing:
        return f"{sentence}the files hold another embedding than the store"
    worst = min(sequence.failing, key=lambda name: sequence.outputs[name].cosine)
    agreement = sequence.outputs[worst]
    sentence += (
        f"{worst} has cosine {agreement.cosine:.6f} (at least {limits.min_cosine}) and relative error "
        f"{agreement.relative_error:.2e} (at most {limits.max_relative_error}) to what is right in fp32"
    )
    if sequence.resembles:
        sentence += f"; it is the vector of {sequence.resembles}"
    elif agreement.nearer_to:
        sentence += f"; it is nearer to {agreement.nearer_to}"
    return f"{sentence}; the store holds another" if sequence.differs_from_store else sentence


def _figures(agreements: Sequence[Agreement]) -> OutputAgreement:
    cosines = [agreement.cosine for agreement in agreements]
    errors = [agreement.relative_error for agreement in agreements]
    return OutputAgreement(
        sequences=len(agreements),
        cosine_min=min(cosines),
        cosine_median=median(cosines),
        relative_error_max=max(errors),
        relative_error_median=median(errors),
        scale_median=median(agreement.scale for agreement in agreements),
    )
