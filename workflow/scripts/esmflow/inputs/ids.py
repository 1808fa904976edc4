"""What a record is called: the first word of its header, its accession, or what a regular expression finds."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from esmflow.errors import EsmflowError

if TYPE_CHECKING:
    from esmflow.inputs.records import RecordBlock

FIRST_WORD, ACCESSION = "first_word", "accession"

# As NCBI and UniProt write them: sp|P84927|NAME, ref|NP_1.1|, gi|1|gb|AAA1.1|, pir||A1234, gnl|database|id, pdb|1ABC|A.
_ACCESSION = re.compile(
    r"(?:gi\|\d+\|)?(?:(?:sp|tr|ref|gb|emb|dbj|tpg|tpe|tpd|lcl|gi)\||(?:pir|prf)\|[^|\s]*\||gnl\|[^|\s]+\|)([^|\s]+)"
)
_CHAIN = re.compile(r"(?:gi\|\d+\|)?pdb\|(\w+)\|(\w*)")


class IdError(EsmflowError):
    """A way to name records that cannot be used. The message says what is wrong with it."""


def id_pattern(rule: str) -> re.Pattern[str]:
    """The regular expression of a rule, which has one group. Raises IdError."""
    try:
        pattern = _ACCESSION if rule == ACCESSION else re.compile(rule)
    except re.error as error:
        raise IdError(f"{rule} is no regular expression ({error})") from error
    if pattern.groups != 1:
        raise IdError(
            f"{rule} has {pattern.groups or 'no'} groups; write {FIRST_WORD}, {ACCESSION}, or a regular expression "
            r"with one group around what is the id, such as \|(\w+)\|"
        )
    return pattern


def renamed(block: RecordBlock, rule: str) -> RecordBlock:
    """Records under the ids that a rule gives, with their whole headers as descriptions.

    Where the rule finds none it is the first word. What is no record, such as a row about a file, keeps its empty id.
    """
    import pyarrow as pa

    pattern = id_pattern(rule)
    words = block.ids.to_pylist()
    headers = [f"{word} {rest}".strip() for word, rest in zip(words, block.descriptions.to_pylist())]
    ids = [_found(pattern, header, rule) or word for word, header in zip(words, headers)]
    return replace(block, ids=pa.array(ids, pa.string()), descriptions=pa.array(headers, pa.string()))


def accession(header: str) -> str:
    """The accession in a header; nothing where there is none."""
    return _found(_ACCESSION, header, ACCESSION)


def _found(pattern: re.Pattern[str], header: str, rule: str) -> str:
    if rule != ACCESSION:
        found = pattern.search(header)
        return (found.group(1) or "") if found else ""
    if chain := _CHAIN.match(header):
        return "_".join(filter(None, chain.groups()))
    # Only gi without another accession behind it is one itself.
    return found.group(1) if (found := pattern.match(header)) else ""
