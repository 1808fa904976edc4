"""The fenced blocks of the project's documents, and what the documents say about running them.

A block of `bash` or `python` is run by a test as it stands, unless the line above it is a comment that says why not:
`<!-- needs a cluster -->`, another of NEEDS, or `<!-- shown by tests/… -->`, naming the test that runs it. For all
blocks of a page in one language: `<!-- python blocks: shown by tests/… -->`, anywhere on the page.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clone import PROJECT

NEEDS = ("a cluster", "a GPU", "a network", "a container", "conda", "faiss", "scanpy")
LANGUAGES = ("", "bash", "python", "yaml", "tsv", "text", "fasta", "json")
RUNNABLE = ("bash", "python")

_MARK = re.compile(r"<!-- (needs|shown by) (.+) -->")
_PAGE_MARK = r"<!-- {language} blocks: (needs|shown by) (.+) -->"
_FENCE = re.compile(r"^ *```([\w-]*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block. line: of its first line of code. need, shown_by: what the mark above it says, if any."""

    document: str
    line: int
    language: str
    code: str
    need: str = ""
    shown_by: str = ""

    @property
    def make_targets(self) -> list[str]:
        """The targets, if the block is nothing but calls of `make`."""
        found = [re.fullmatch(r"make ([\w-]+) *(#.*)?", line) for line in self.code.splitlines() if line.strip()]
        return [match[1] for match in found if match] if all(found) else []

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def documents() -> list[Path]:
    """Every page that tells a user what to do."""
    patterns = ("*.md", "docs/*.md", "config/README.md", "profiles/**/README.md", "benchmarks/README.md")
    patterns += ("examples/**/README.md", "resources/**/README.md")
    return sorted(path for pattern in patterns for path in PROJECT.glob(pattern))


def blocks(*languages: str) -> Iterator[Block]:
    """The blocks in these languages, of all documents; all blocks if none is named."""
    for path in documents():
        text = path.read_text()
        for fence in _FENCE.finditer(text):
            if languages and fence[1] not in languages:
                continue
            above = text[: fence.start()].rstrip().rpartition("\n")[2].strip()
            mark = _MARK.fullmatch(above) or re.search(_PAGE_MARK.format(language=fence[1]), text)
            yield Block(
                str(path.relative_to(PROJECT)),
                text.count("\n", 0, fence.start(2)) + 1,
                fence[1],
                textwrap.dedent(fence[2]),
                need=mark[2] if mark and mark[1] == "needs" else "",
                shown_by=mark[2] if mark and mark[1] == "shown by" else "",
            )
