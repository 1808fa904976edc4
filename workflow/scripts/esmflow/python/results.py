"""What a run has written, for Python: vectors by id, all of them as a matrix, the manifest, neighbours.

>>> e = esmflow.open("out")
>>> len(e), e.array, e.arrays
(66, 'mean_layer6', ['mean_layer6', 'per_residue_layer6'])
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from esmflow.arrays import Array
from esmflow.collect.formats import FORMATS
from esmflow.collect.summary import Summary
from esmflow.errors import EsmflowError
from esmflow.files import results_folder
from esmflow.inputs.ids import accession
from esmflow.inputs.sheet import InputFile
from esmflow.python.neighbours import Neighbours
from esmflow.python.readers import READERS, Reader, Written

if TYPE_CHECKING:
    import anndata

_NAMED = 10


class ResultsError(EsmflowError):
    """Something that the results of a run do not have. The message says what they have, or what to do."""


class NoSuchIdError(ResultsError, KeyError):
    """An id without an embedding. The message says why there is none."""

    __str__ = Exception.__str__


def open_results(folder: str | os.PathLike[str], array: str | None = None) -> Results:
    """Opens what a run has written: the folder given to `esmflow embed -o`, that of a workflow, or its `results`.

    array: the output that vectors are taken from, such as `mean_layer33`; without it the last layer's mean, or else the
    first that has one vector for each protein. Raises ResultsError for a folder without a finished run, and for an
    array that the run did not compute.

    >>> esmflow.open("out", array="mean_layer5")
    Traceback (most recent call last):
    ...
    esmflow.python.results.ResultsError: out has no mean_layer5; it has mean_layer6, per_residue_layer6
    """
    results = results_folder(folder)
    if not results.is_dir():
        raise ResultsError(f"{folder}: there is no such folder; give the one that a run has written to")
    try:
        summary = Summary.read(results / "summary.json")
        manifest = pl.read_parquet(results / "manifest.parquet")
    except FileNotFoundError as error:
        raise ResultsError(
            f"{folder}: holds no results of a finished run ({error.filename or 'manifest.parquet'} is not there); "
            "give the folder of a run, and run it to its end"
        ) from error
    return Results(results, manifest, summary, array, os.fspath(folder))


class Results:
    """What a run has written. `len`, `in` and iteration are about the ids with embeddings.

    >>> e["P84927"].dtype
    dtype('float32')
    >>> "P84927" in e
    True

    An id is what the manifest has, or the accession in it where that names one record. Records are numbered by `rows`,
    in manifest order; so are the rows of `matrix`.
    """

    def __init__(self, folder: Path, manifest: pl.DataFrame, summary: Summary, array: str | None, shown: str) -> None:
        self.folder = folder
        """The folder `results` of the run."""
        self.manifest = manifest
        """One row for each record of the input: where its embedding is, or why there is none."""
        self.arrays = list(summary.arrays)
        """The outputs that the run computed, such as `mean_layer33`."""
        self._formats = summary.formats
        self._shown = shown
        pooled = [name for name in self.arrays if Array.named(name).is_pooled]
        means = [name for name in pooled if Array.named(name).kind == "mean"]
        self.array = self._checked(array) if array else next(iter([*means[-1:], *pooled, *self.arrays]))
        """The output that vectors are taken from."""
        self._readers: dict[str, Reader] = {}

    def __repr__(self) -> str:
        return f"<esmflow.Results of {self._shown}: {len(self):,} of {len(self.manifest):,} records, {self.array}>"

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, identifier: object) -> bool:
        return identifier in self._row_of or identifier in self._accessions

    def __iter__(self) -> Any:
        return iter(self.ids)

    def __getitem__(self, identifier: str) -> np.ndarray:
        """The vector of one record, `[D]`, or its number, `[]`, where `array` is `pseudo_perplexity`.

        Raises NoSuchIdError, which says why the record was rejected if it is one of the input's, and ResultsError for
        an id that several records have.

        >>> e["stop_inside"]
        Traceback (most recent call last):
        ...
        esmflow.python.results.NoSuchIdError: stop_inside has no embedding: invalid_residue ('*' at residue 51)
        """
        return self._reader(self._pooled()).record(self._row(identifier))

    @cached_property
    def rows(self) -> pl.DataFrame:
        """The manifest's rows of the records with embeddings, in their order; `manifest_row` numbers them there."""
        numbered = self.manifest.with_row_index("manifest_row")
        return numbered.filter(pl.col("status").cast(pl.String) == "embedded")

    @cached_property
    def ids(self) -> list[str]:
        """The ids of the records with embeddings, in manifest order: one for each row of `matrix`.

        >>> e.ids[:2]
        ['sp|P84927|DMS7_PHYTS', 'sp|O51528|RECG_BORBU']
        """
        return self.rows["id"].to_list()

    @property
    def failures(self) -> pl.DataFrame:
        """The records without an embedding, and why: file, record, id, reason, detail.

        >>> e.failures["reason"].to_list()
        ['empty_sequence', 'invalid_residue', 'invalid_residue', 'nucleotide_sequence']
        """
        columns = ("file", "record", "id", "reason", "detail")
        return self.manifest.filter(pl.col("reason").is_not_null()).select(columns)

    @property
    def variants(self) -> pl.DataFrame:
        """A row for each row of the run's table of variants: its scores, or the reason why it has none.

        Raises ResultsError for a run without such a table.
        """
        path = self.folder / "variants.parquet"
        if not path.exists():
            raise ResultsError(f"{self._shown} has no variants; name a table of them under variants, and run it again")
        return pl.read_parquet(path)

    def matrix(self, array: str | None = None) -> np.ndarray:
        """All vectors, `[N, D]`, or numbers, `[N]`, in the order of `ids`; of an array by residue, all rows end to end.

        From the first of the run's formats that has them. Mapped from the file where that is `npy`, else in memory.

        >>> e.matrix().shape
        (66, 320)
        """
        return self._reader(self._checked(array) if array else self._pooled()).matrix()

    def per_residue(self, identifier: str, array: str | None = None) -> np.ndarray:
        """What one record has for each of its residues: `[residues, D]`, without cls and eos.

        array: another than the last layer's, or `logits` (`[residues, 33]`), `entropy` (`[residues]`), `contacts`
        (`[residues, residues]`) or a layer's `attention` (`[heads, residues + 2, residues + 2]`, with cls and eos).

        >>> e.per_residue("P84927").shape
        (31, 320)
        """
        if array is None:
            found = [name for name in self.arrays if Array.named(name).kind == "per_residue"]
            if not found:
                raise ResultsError(
                    f"{self._shown} has nothing for each residue, only {', '.join(self.arrays)}; "
                    "put per_residue into include and run it again"
                )
            array = found[-1]
        values = self._reader(self._checked(array)).record(self._row(identifier))
        if Array.named(array).kind != "contacts":
            return values
        residues = int(np.sqrt(values.size))
        return values.reshape(residues, residues)

    def nearest(self, query: str | np.ndarray, k: int = 10) -> pl.DataFrame:
        """The k records whose vectors have the largest cosine to a record's, itself aside, or to a vector `[D]`.

        Exact, with FAISS where it is installed and else with scikit-learn. Columns: id, cosine, and row, of `matrix`.

        >>> e.nearest("P84927", k=3).columns
        ['id', 'cosine', 'row']
        """
        itself = self._row(query) if isinstance(query, str) else None
        vector = self[query] if isinstance(query, str) else np.asarray(query)
        width = self._neighbours.width
        if vector.shape != (width,):
            raise ResultsError(f"a vector of shape {vector.shape} has no neighbours among those of {width} values")
        cosines, rows = self._neighbours.of(vector, min(len(self), k + (itself is not None)))
        others = [(row, cosine) for row, cosine in zip(rows.tolist(), cosines.tolist()) if row != itself][:k]
        return pl.DataFrame(
            {
                "id": [self.ids[row] for row, _ in others],
                "cosine": [c for _, c in others],
                "row": [r for r, _ in others],
            },
            schema={"id": pl.String, "cosine": pl.Float32, "row": pl.Int64},
        )

    def to_anndata(self) -> anndata.AnnData:
        """An AnnData: vectors in `X`, what the manifest knows of each record in `obs`.

        >>> e.to_anndata().shape
        (66, 320)
        """
        import anndata
        import pandas as pd

        obs = self.rows.drop("manifest_row").to_pandas()
        obs.index = anndata.utils.make_index_unique(pd.Index(self.ids))
        return anndata.AnnData(np.array(self._vectors()), obs=obs, uns={"esmflow": {"array": self.array}})

    @cached_property
    def _neighbours(self) -> Neighbours:
        return Neighbours(self._vectors())

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {identifier: row for row, identifier in enumerate(self.ids)}

    @cached_property
    def _repeated(self) -> dict[str, list[int]]:
        if len(self._row_of) == len(self.ids):
            return {}
        counts = self.rows.with_row_index("matrix_row").group_by("id").agg("matrix_row")
        repeated = counts.filter(pl.col("matrix_row").list.len() > 1)
        return dict(zip(repeated["id"].to_list(), repeated["matrix_row"].to_list()))

    @cached_property
    def _accessions(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for row, identifier in enumerate(self.ids):
            if "|" in identifier and (short := accession(identifier)):
                found.setdefault(short, []).append(row)
        return found

    def _row(self, identifier: str) -> int:
        if not isinstance(identifier, str):
            raise ResultsError(f"{identifier!r} is no id; matrix() has the vectors by their rows")
        rows = self._repeated.get(identifier, [])
        if not rows:
            rows = [self._row_of[identifier]] if identifier in self._row_of else self._accessions.get(identifier, [])
        if len(rows) > 1:
            places = [self._place(row) for row in rows[:_NAMED]]
            more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
            raise ResultsError(
                f"{len(rows)} records have the id {identifier}: {', '.join(places)}{more}; "
                "take the one that is meant from matrix() by its row"
            )
        if not rows:
            raise NoSuchIdError(self._why_not(identifier))
        return rows[0]

    def _place(self, row: int) -> str:
        record = self.rows.row(row, named=True)
        return f"row {row} (record {record['record']} of {record['file']})"

    def _why_not(self, identifier: str) -> str:
        found = self.failures.filter(pl.col("id") == identifier)
        if len(found):
            record = found.row(0, named=True)
            return f"{identifier} has no embedding: {record['reason']} ({record['detail']})"
        return f"{self._shown} has no record {identifier}; its ids are such as {', '.join(self.ids[:3]) or 'none'}"

    def _pooled(self) -> str:
        if not Array.named(self.array).is_pooled:
            raise ResultsError(f"{self.array} has no vector for each protein; per_residue(id) has what there is")
        return self.array

    def _vectors(self) -> np.ndarray:
        if Array.named(self._pooled()).is_vector:
            return self.matrix()
        raise ResultsError(f"{self.array} is a number and no vector; open the results with another array")

    def _checked(self, array: str) -> str:
        if array not in self.arrays:
            raise ResultsError(f"{self._shown} has no {array}; it has {', '.join(self.arrays)}")
        return array

    def _reader(self, name: str) -> Reader:
        if name not in self._readers:
            self._readers[name] = self._open(Array.named(name))
        return self._readers[name]

    def _open(self, array: Array) -> Reader:
        embeddings = self.folder / "embeddings"
        able = [name for name in self._formats if FORMATS[name].holds(array)]
        for name in able:
            place, read = READERS[name]
            if (embeddings / place.format(array=array.name)).exists():
                return read(self._written(embeddings, array))
        holding = ", ".join(each.name for each in FORMATS.values() if each.holds(array))
        remedy = "run it again, which writes them anew" if able else f"put one of {holding} into formats, and run again"
        raise ResultsError(f"{embeddings}: {array.name} is in no file of {', '.join(self._formats)}; {remedy}")

    def _written(self, embeddings: Path, array: Array) -> Written:
        files = self.manifest.select(pl.col("sample", "file").cast(pl.String)).unique(
            subset="file", maintain_order=True
        )
        inputs = [InputFile(sample, file) for sample, file in files.iter_rows()]
        number = {file.path: n for n, file in enumerate(inputs)}
        own = self.rows.select(pl.col("file").cast(pl.String)).with_columns(
            position=pl.int_range(pl.len()).over("file"),
            number=pl.col("file").replace_strict(number, return_dtype=pl.Int64),
        )
        return Written(embeddings, array, self.ids, inputs, own["number"].to_numpy(), own["position"].to_numpy())
