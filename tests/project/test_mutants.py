"""The list of mutants is up to date: each is a change that can be made, to a line that is there once."""

from __future__ import annotations

import shlex

import mutants
import pytest


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_mutant_changes_a_line_that_is_there_and_names_tests_that_are(mutant):
    assert (mutants.PROJECT / mutant.file).read_text().count(mutant.old) == 1, "mend tests/mutants.py, or take it out"
    paths = [word for word in shlex.split(mutant.tests) if word.startswith(("unit/", "workflow/"))]
    assert paths
    for path in paths:
        assert (mutants.PROJECT / "tests" / path).exists()


def test_every_mutant_has_a_name_of_its_own():
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 60
