"""What the pages on trouble and on reproducibility quote is what the code says."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from esmflow.method import Fingerprint

PROJECT = Path(__file__).resolve().parents[2]
TROUBLESHOOTING = (PROJECT / "docs/troubleshooting.md").read_text()
# The first cell of a table's row, where it is one quoted message.
MESSAGES = re.findall(r"^\| `([^`]+ [^`]+)` \|", TROUBLESHOOTING, re.MULTILINE)


def sentences() -> list[str]:
    """Every string in the library and its scripts, with `…` in place of what is filled in."""
    found = []
    for path in (PROJECT / "workflow/scripts").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"\{\w+\}|%[-\d.,]*[sdrf]", "…", node.value))
    return found


SENTENCES = sentences()


def test_the_page_quotes_messages():
    assert len(MESSAGES) > 20


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_one_that_the_code_can_give(message):
    pattern = re.compile(".+".join(re.escape(part) for part in message.strip("…").split("…")))
    assert any(pattern.search(sentence) for sentence in SENTENCES)


@pytest.mark.parametrize("part", [field.name for field in fields(Fingerprint)])
def test_every_part_of_the_fingerprint_is_explained(part):
    assert f"`{part}`" in (PROJECT / "docs/reproducibility.md").read_text()
