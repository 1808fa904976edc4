"""Each limit of the certificate is a limit by itself, and what nobody looked at is not said to be right."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from esmflow.verify.agreement import LIMITS, MEDIAN_SHARE, Agreement
from esmflow.verify.certificate import Certificate
from esmflow.verify.manifest_check import ManifestCheck
from esmflow.verify.read_back import Sampled
from esmflow.verify.verdict import judge
from esmflow.verify.worker import Verified

STORE = SimpleNamespace(path=lambda name: Path(name))
GOOD = Agreement(cosine=1.0, relative_error=0.0, scale=1.0)


def judged(agreements, precision, arrays=("mean_layer6",)):
    """The verdict on one sequence for each agreement, or for each dictionary of agreements by array."""
    by_array = [each if isinstance(each, dict) else {"mean_layer6": each} for each in agreements]
    sampled = [
        Sampled(f"{n:032x}", "MKV", "s", "a.faa", n + 1, f"p{n}", 3, precision, "segment", n, n, n)
        for n in range(len(by_array))
    ]
    verified = Verified({record.digest: each for record, each in zip(sampled, by_array, strict=True)})
    return judge(sampled, verified, ManifestCheck(len(sampled)), arrays, LIMITS.__getitem__, STORE)


@pytest.fixture(params=LIMITS)
def precision(request):
    return request.param


def beside(limit, step):
    """Just within a limit, and just beyond it."""
    return limit - step, limit + step


def test_one_cosine_that_is_too_low_is_found_by_itself(precision):
    beyond, within = beside(LIMITS[precision].min_cosine, 1e-7)
    others = [GOOD] * 4
    assert judged([*others, Agreement(within, 0.0, 1.0)], precision).passed
    verdict = judged([*others, Agreement(beyond, 0.0, 1.0)], precision)
    assert (verdict.passed, verdict.remedy, len(verdict.problems)) == (False, "recompute", 1)
    assert [sequence.passed for sequence in verdict.sequences] == [True] * 4 + [False]


def test_one_relative_error_that_is_too_large_is_found_by_itself(precision):
    within, beyond = beside(LIMITS[precision].max_relative_error, 1e-7)
    others = [GOOD] * 4
    assert judged([*others, Agreement(1.0, within, 1.0)], precision).passed
    verdict = judged([*others, Agreement(1.0, beyond, 1.0)], precision)
    assert (verdict.passed, verdict.remedy, len(verdict.problems)) == (False, "recompute", 1)


def test_a_median_error_that_is_too_large_is_found_though_no_sequence_is_beyond_a_limit(precision):
    within, beyond = beside(MEDIAN_SHARE * LIMITS[precision].max_relative_error, 1e-7)
    assert judged([GOOD, GOOD, *[Agreement(1.0, within, 1.0)] * 3], precision).passed
    assert judged([GOOD, GOOD, GOOD, *[Agreement(1.0, beyond, 1.0)] * 2], precision).passed
    verdict = judged([GOOD, GOOD, *[Agreement(1.0, beyond, 1.0)] * 3], precision)
    assert (verdict.passed, verdict.remedy) == (False, "another_way")
    assert all(sequence.passed for sequence in verdict.sequences)


def test_the_scale_of_a_number_is_its_error_and_has_the_limit_of_errors(precision):
    within, beyond = beside(MEDIAN_SHARE * LIMITS[precision].max_relative_error, 1e-7)
    for size, passed in ((within, True), (beyond, False)):
        agreements = [{"pseudo_perplexity": Agreement(1.0, size, 1 + size)}] * 3
        assert judged(agreements, precision, ("pseudo_perplexity",)).passed is passed


def test_a_median_scale_that_is_off_is_found_though_no_sequence_is_beyond_a_limit(precision):
    for sign in (1, -1):
        within, beyond = (1 + sign * scale for scale in beside(LIMITS[precision].scale, 1e-7))
        assert judged([GOOD, GOOD, *[Agreement(1.0, 0.0, within)] * 3], precision).passed
        verdict = judged([GOOD, GOOD, *[Agreement(1.0, 0.0, beyond)] * 3], precision)
        assert (verdict.passed, verdict.remedy) == (False, "another_way")


def test_an_output_that_nobody_could_compare_is_not_said_to_be_right():
    with_contacts = {"mean_layer6": GOOD, "contacts": GOOD}
    arrays = ("mean_layer6", "contacts")
    assert judged([with_contacts, GOOD], "fp32", arrays).not_verified == ()
    verdict = judged([GOOD, GOOD, {}], "fp32", arrays)
    assert (verdict.passed, verdict.not_verified) == (True, ("contacts",))
    certificate = Certificate(**vars(verdict), computed_again=2)
    assert certificate.line().endswith("; not verified: contacts")
    assert certificate.verified_sequences() == 2
