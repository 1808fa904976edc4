"""Links from one page to another lead somewhere."""

from __future__ import annotations

import re

import pytest
from documents import PROJECT, documents

LINK = re.compile(r"\]\((?!\w+:)([^)#]*)(?:#([^)]+))?\)")


def anchors(text: str) -> set[str]:
    """The headings as GitHub names them in links."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", documents(), ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    for path, anchor in LINK.findall(page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text()), f"{path}#{anchor}"
