"""Made proteins.fasta and labels.tsv; kept to show how.

Needs MMseqs2 (14-7e284) and its examples as Debian packs them, and `workflow/scripts` in PYTHONPATH:
python examples/enzymes/select_proteins.py /usr/share/doc/mmseqs2/example-data/DB.fasta.gz examples/enzymes
"""

import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from esmflow.inputs.fasta import read_records
from esmflow.inputs.records import Record

# Lengths that both classes have in plenty, so that length says little.
SHORTEST, LONGEST = 100, 400

NAME = re.compile(r"^(?P<name>.*?)(?P<notes>( \([^()]*\))*) OS=")
ENZYME = re.compile(r"ase( [A-Z0-9]{1,4})?$")
# Names that do not tell, and parts of larger machines.
UNCLEAR = re.compile(
    r"uncharacteri|putative|probable|hypothetical|inactive|domain-containing|UPF0|enzyme|bifunctional|inhibitor|regulat"
    r"|-like|homolog|binding|subunit|chain|associated|family|fragment|^protein |permease|translocase|release",
    re.IGNORECASE,
)
# Enzymes by other names.
ENZYMES_BY_OTHER_NAMES = re.compile(
    r"P450|acrosin|testisin|cathepsin|staphopain|pepsin|patatin|redoxin|ribosome-inactivating|CobD|TtcA|thiolation"
    r"|RNA replication|Ras-related|FtsY|RING-H2|iron-sulfur cluster carrier|flippase|maturase",
    re.IGNORECASE,
)


def name_of(description: str) -> str:
    """The protein's name, which UniProt writes before the organism."""
    return description.split(" OS=")[0]


def label(description: str) -> str | None:
    """`enzyme` if the curated name ends in -ase, `other` if it names no enzyme; None where the name does not tell."""
    found = NAME.match(description)
    if found is None or UNCLEAR.search(found["name"] + found["notes"]):
        return None
    if ENZYME.search(found["name"]):
        return "enzyme"
    if re.search("ase", found["name"] + found["notes"]) or ENZYMES_BY_OTHER_NAMES.search(found["name"]):
        return None
    return "other"


def candidates(path: str) -> Iterator[tuple[Record, str]]:
    """Reviewed entries (Swiss-Prot) of the right length whose name tells what they are, by accession."""
    for record in sorted(read_records(path), key=lambda record: record.id):
        if record.id.startswith("sp|") and SHORTEST <= record.length <= LONGEST and record.reason is None:
            found = label(record.description)
            if found is not None:
                yield record, found


def related(records: list[Record]) -> Iterator[tuple[int, int]]:
    """Pairs that MMseqs2 finds related, with an E-value of at most 0.1, at its most sensitive; or of one name."""
    first_of_name: dict[str, int] = {}
    for number, record in enumerate(records):
        yield number, first_of_name.setdefault(name_of(record.description).lower(), number)
    with tempfile.TemporaryDirectory() as folder:
        fasta, hits = Path(folder) / "all.fasta", Path(folder) / "hits.tsv"
        fasta.write_text("".join(f">{number}\n{record.sequence}\n" for number, record in enumerate(records)))
        search = ["mmseqs", "easy-search", fasta, fasta, hits, f"{folder}/tmp", "-s", "7.5", "-e", "0.1"]
        subprocess.run([*search, "--max-seqs", "10000", "--format-output", "query,target"], check=True)
        for line in hits.read_text().splitlines():
            query, target = line.split("\t")
            yield int(query), int(target)


def one_of_each_family(records: list[Record]) -> list[int]:
    """The first of each connected component of the related pairs: no two that are kept are related."""
    pairs = list(related(records))
    rows, columns = zip(*pairs, strict=True)
    graph = coo_array(([True] * len(pairs), (rows, columns)), shape=(len(records), len(records)))
    _, family = connected_components(graph, directed=False)
    first: dict[int, int] = {}
    for number, of in enumerate(family.tolist()):
        first.setdefault(of, number)
    return sorted(first.values())


def main(source: str, folder: str) -> None:
    chosen = list(candidates(source))
    kept = [chosen[number] for number in one_of_each_family([record for record, _ in chosen])]
    with open(f"{folder}/proteins.fasta", "w") as fasta, open(f"{folder}/labels.tsv", "w", newline="") as table:
        writer = csv.writer(table, delimiter="\t", lineterminator="\n")
        writer.writerow(("id", "label", "name"))
        for record, what in kept:
            lines = re.findall(".{1,60}", record.sequence)
            fasta.write("\n".join([f">{record.id} {record.description}", *lines]) + "\n")
            writer.writerow((record.id, what, name_of(record.description)))


if __name__ == "__main__":
    main(*sys.argv[1:])
