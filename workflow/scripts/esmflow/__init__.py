"""esmflow: from protein FASTA files to ESM-2 embeddings, with every record accounted for.

The library behind the workflow's scripts; it knows nothing of Snakemake. In Python and in notebooks:

>>> import esmflow
>>> e = esmflow.open("out")                  # what a run has written
>>> e["P84927"].shape
(320,)

`esmflow.embed` computes vectors without a run.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esmflow.python.results import Results, ResultsError
    from esmflow.python.results import open_results as open
    from esmflow.python.vectors import SequencesError, embed

__all__ = ["Results", "ResultsError", "SequencesError", "embed", "open"]

_PLACES = {
    "Results": ("results", "Results"),
    "ResultsError": ("results", "ResultsError"),
    "open": ("results", "open_results"),
    "SequencesError": ("vectors", "SequencesError"),
    "embed": ("vectors", "embed"),
}


# The rules import this where there is nothing but Snakemake: nothing is loaded before it is asked for.
def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'esmflow' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _PLACES[name]
    return getattr(import_module(f"esmflow.python.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
