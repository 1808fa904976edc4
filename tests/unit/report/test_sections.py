"""What a section of the report says in words."""

from types import SimpleNamespace

import pytest

from esmflow.report.sections import certificate
from esmflow.verify.certificate import Certificate

WITH = {"verified_with": "fair-esm", "computed_again": 3}


@pytest.mark.parametrize(
    ("found", "note"),
    [
        (Certificate(passed=True, **WITH), "Passed. 3 sequences computed again with fair-esm."),
        (
            Certificate(passed=True, verified_before=1200, **WITH),
            "Passed. 3 sequences computed again with fair-esm, 1,200 verified by an earlier run.",
        ),
        (Certificate(passed=False, **WITH), "NOT PASSED: do not use these embeddings. 3 sequences computed again"),
        (Certificate(passed=None), "NOT VERIFIED: no sequence could be computed again. 0 sequences"),
        (None, "Verification was off: no embedding was computed again."),
    ],
)
def test_the_certificate_says_how_much_was_verified_and_with_what_verdict(found, note):
    assert certificate(
        SimpleNamespace(certificate=found, fingerprint=SimpleNamespace(long=None)), None
    ).note.startswith(note)
