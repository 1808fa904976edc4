"""Numbers as a person reads them say neither more nor less than what is so."""

from __future__ import annotations

import pytest

from esmflow.errors import EsmflowError
from esmflow.text import bytes_in_words, duration, in_words, percent, record_name, shown, span


@pytest.mark.parametrize(
    ("share", "words"),
    [(1, "100%"), (0, "0%"), (9_999_999 / 10_000_000, "99.99%"), (1e-7, "under 0.1%"), (228 / 232, "98.3%")],
)
def test_all_and_nothing_are_said_only_when_true(share, words):
    assert percent(share) == words


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (1500, "1.5 kB"),
        (12_345_678, "12.3 MB"),
        (29_648_212, "29.6 MB"),
        (5e11, "500 GB"),
        (2.5e15, "2,500 TB"),
        (1e18, "1,000,000 TB"),
    ],
)
def test_sizes_have_the_unit_that_suits_them(size, words):
    assert bytes_in_words(size) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "0.2 s"), (6.0, "6 s"), (38.4, "38 s"), (600, "10 min"), (12_000, "3 h 20 min"), (604_800, "168 h 0 min")],
)
def test_durations_have_the_unit_that_suits_them(seconds, words):
    assert duration(seconds) == words


def test_a_day_is_said_once():
    first, last = span(1_795_523_048.0, 1_795_523_049.0).split(" to ")
    assert first[:4] == "2026"
    assert last.count("-") == 0
    assert span(0.0, 10_000_000.0).count("1970-") == 2


def test_items_are_listed_as_a_sentence_has_them():
    assert in_words(["a"]) == "a"
    assert in_words(iter(["a", "b", "c"])) == "a, b and c"
    assert in_words([]) == "nothing"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sp|P84927|X é", "sp|P84927|X é"),
        ("=1+1", "=1+1"),
        ("a\nERROR all is lost", "a\\nERROR all is lost"),
        ("\x1b[2J\x07\x9b31m", "\\x1b[2J\\x07\\x9b31m"),
        ("gpj.\u202eexe", "gpj.\\u202eexe"),
        ("a\u2028b\u200bc\u00a0d\x85", "a\\u2028b\\u200bc\\xa0d\\x85"),
        ("\udce9", "\\udce9"),
        ("i" * 200, "i" * 200),
        ("i" * 3_000_000, "i" * 199 + "…"),
    ],
    ids=["plain", "formula", "line end", "escape codes", "direction", "unseen", "not UTF-8", "200", "long"],
)
def test_a_text_of_others_is_one_line_that_steers_nothing(text, expected):
    assert shown(text) == expected
    assert shown(expected) == expected


def test_a_record_is_called_by_file_number_and_id():
    assert record_name("in/a.fa", 3, "x\ty") == "in/a.fa, record 3 (x\\ty)"
    assert record_name("in/\x1b.fa", 1, "") == "in/\\x1b.fa, record 1 (no id)"


def test_an_error_for_the_user_steers_no_terminal_and_keeps_its_lines():
    assert str(EsmflowError("not here:\n\t\x1b]0;title\x07.fa\x9b")) == "not here:\n\t\\x1b]0;title\\x07.fa\\x9b"
