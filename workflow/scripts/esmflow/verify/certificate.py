"""`certificate.json`: how well a sample of the embeddings agrees with fair-esm's own, and what is wrong if not."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from esmflow.files import JsonFile
from esmflow.text import in_words, record_name
from esmflow.verify.agreement import Agreement, Limits

_PROBLEMS = 3


class Remedy(StrEnum):
    """What would mend embeddings that are wrong: collect them again from the store, compute some segments again, or
    compute all of them in another way."""

    COLLECT = "collect"
    RECOMPUTE = "recompute"
    ANOTHER_WAY = "another_way"


@dataclass(frozen=True)
class OutputAgreement:
    """How well one array agrees, over all sequences that were computed again."""

    sequences: int
    cosine_min: float
    cosine_median: float
    relative_error_max: float
    relative_error_median: float
    scale_median: float


@dataclass(frozen=True, kw_only=True)
class VerifiedSequence:
    """One sequence of the sample. digest to position: as of `Sampled`.

    passed: None if it could not be computed again. outputs: by array. failing: the arrays that do not agree.
    differs_from_store: whether the files hold another embedding than the store. resembles: another record of the
    sample, whose embedding this one is instead. verified_before: whether `outputs` is what an earlier run found.
    """

    digest: str
    file: str
    record: int
    id: str
    length: int
    precision: str
    segment: str
    row: int
    position: int
    passed: bool | None
    outputs: dict[str, Agreement]
    failing: tuple[str, ...] = ()
    differs_from_store: bool = False
    resembles: str | None = None
    verified_before: bool = False

    @property
    def name(self) -> str:
        """For a person."""
        return record_name(self.file, self.record, self.id)


@dataclass(frozen=True, kw_only=True)
class Certificate(JsonFile):
    """The certificate of a run.

    passed, verdict: None and `not verified` if no sequence could be computed again and nothing else is wrong.
    problems: sentences. remedy: what would mend them; segments: the files of the store to which it applies.
    read_from: the format that the sample was read back from, or `store`. sample, seed: as configured. limits: by
    precision. computed_again, verified_before, files_checked: how many sequences were computed by this run, how many by
    an earlier one with the numbers that the store still has, and for how many the files were held against the store.
    not_computed: how many of the sample do not fit into memory. outputs: by array. not_verified: the arrays of which
    there was none to compare, as maps of contacts may not fit into memory.
    """

    passed: bool | None
    verdict: str = ""
    problems: tuple[str, ...] = ()
    remedy: Remedy | None = None
    segments: tuple[str, ...] = ()
    model: str = ""
    checkpoint: str = ""
    fingerprint: str = ""
    engine: str = ""
    verified_with: str = ""
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    read_from: str = ""
    sample: int = 0
    seed: int = 0
    limits: dict[str, Limits] = field(default_factory=dict)
    records_checked: int = 0
    computed_again: int = 0
    verified_before: int = 0
    files_checked: int = 0
    not_computed: int = 0
    model_load_seconds: float = 0.0
    seconds: float = 0.0
    outputs: dict[str, OutputAgreement] = field(default_factory=dict)
    not_verified: tuple[str, ...] = ()
    sequences: tuple[VerifiedSequence, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "verdict", {True: "passed", False: "not passed", None: "not verified"}[self.passed])

    def line(self) -> str:
        """The certificate in one line."""
        verdict = "" if self.passed else f"{self.verdict.upper()}: "
        if not self.outputs:
            return f"{verdict}no embedding was computed again"
        # Older certificates do not say it.
        by_fair_esm = self.verified_with.startswith("fair-esm") or not self.verified_with
        right = "fair-esm in fp32" if by_fair_esm else self.verified_with.partition(",")[0]
        counts = [f"{self.computed_again} sequences computed again with {right}"]
        if self.verified_before:
            counts += [f"{self.verified_before} verified by an earlier run"]
        cosine = min(output.cosine_min for output in self.outputs.values())
        error = max(output.relative_error_max for output in self.outputs.values())
        unseen = f"; not verified: {in_words(self.not_verified)}" if self.not_verified else ""
        return f"{verdict}{', '.join(counts)}: lowest cosine {cosine:.6f}, largest relative error {error:.1e}{unseen}"

    def verified_sequences(self) -> int:
        """How many sequences were held against what was computed again, by this run or before it."""
        return sum(bool(sequence.outputs) for sequence in self.sequences)

    def problem_lines(self) -> list[str]:
        """What is wrong with the embeddings, the first few things."""
        more = [f"and {len(self.problems) - _PROBLEMS} more"] if len(self.problems) > _PROBLEMS else []
        return [*self.problems[:_PROBLEMS], *more]
