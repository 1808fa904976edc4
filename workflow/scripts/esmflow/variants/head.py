"""The head of the table of variants, which is looked at before anything runs. Needs nothing but Python."""

from __future__ import annotations

import os

from esmflow.errors import EsmflowError
from esmflow.inputs.columns import DELIMITERS, TAB, read_rows, repeated_column
from esmflow.inputs.streams import DAMAGE, suffix, text_chunks
from esmflow.text import shown

ID, VARIANT, SAMPLE = "id", "variant", "sample"


class VariantTableError(EsmflowError):
    """A table of variants that cannot be used. The message names it and says what to do."""


def delimiter(path: str | os.PathLike[str]) -> bytes:
    """What stands between a table's cells: commas in what is called `.csv`, else tabs."""
    return DELIMITERS.get(suffix(path), TAB)


def head_of(path: str | os.PathLike[str]) -> list[str]:
    """The names of a table's columns. Raises VariantTableError where they are not what they must be."""
    try:
        head = next(read_rows(text_chunks(path), delimiter(path)), None)
        names = [cell.decode().strip() for cell in head.cells] if head else []
    except (*DAMAGE, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VariantTableError(
            f"variants: {path} cannot be read ({reason}); give a TSV file with the columns id and variant"
        ) from error
    if not {ID, VARIANT} <= set(names):
        raise VariantTableError(
            f"variants: {path} needs the tab-separated columns id and variant; its first line has: "
            f"{shown(', '.join(names)) or 'nothing'}"
        )
    if repeated := repeated_column(names):
        raise VariantTableError(f"variants: {path} has the column {repeated} twice; rename or remove one")
    return names
