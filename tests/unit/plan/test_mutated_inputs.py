"""Real FASTA, damaged at random as files get damaged: every header is a row of the plan, or some row names it."""

from __future__ import annotations

import gzip
import random
from collections import Counter

import pyarrow.parquet as pq
import pytest
from stage_settings import plan_settings

from esmflow.checkpoint.models import ModelDimensions
from esmflow.inputs.records import printable
from esmflow.inputs.residues import RESIDUE_TOKEN, ResiduePolicy
from esmflow.inputs.sheet import InputFile
from esmflow.plan.cost import CostModel
from esmflow.plan.planning import deal_inputs
from esmflow.plan.shards import list_shards, read_shard

ABOUT_THE_FILE = {"other_format", "unreadable_file", "empty_file"}


def drop_a_byte(text: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(text))
    return text[:at] + text[at + 1 :]


def drop_some_bytes(text: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(text))
    return text[:at] + text[at + rng.randrange(2, 200) :]


def change_a_byte(text: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(text))
    return text[:at] + rng.randbytes(1) + text[at + 1 :]


def join_lines(text: bytes, rng: random.Random) -> bytes:
    lines = text.split(b"\n")
    at = rng.randrange(max(1, len(lines) - 1))
    return b"\n".join([*lines[:at], b"".join(lines[at : at + 2]), *lines[at + 2 :]])


def join_a_header_to_the_line_before(text: bytes, rng: random.Random) -> bytes:
    at = text.find(b"\n>", rng.randrange(len(text)))
    return text if at < 0 else text[:at] + text[at + 1 :]


def join_files_with_marks(text: bytes, rng: random.Random) -> bytes:
    at = text.find(b"\n>", rng.randrange(len(text)))
    return text if at < 0 else text[: at + rng.randrange(2)] + b"\xef\xbb\xbf" + text[at + 1 :]


def insert(text: bytes, rng: random.Random) -> bytes:
    what = [
        b">",
        b"-",
        b"..",
        b"*",
        b"\0",
        b"\x1b[31m",
        b"<b>MKV</b>",
        b'"',
        b"[Met]",
        b"\xe9",
        b"\xc2\xa0",
        b"  ",
        b"\n",
        b"\n\n>",
        b"1",
    ]
    at = rng.randrange(len(text))
    return text[:at] + rng.choice(what) + text[at:]


def cut(text: bytes, rng: random.Random) -> bytes:
    return text[: rng.randrange(1, len(text))]


def cut_the_start(text: bytes, rng: random.Random) -> bytes:
    return text[rng.randrange(len(text)) :]


def other_line_ends(text: bytes, rng: random.Random) -> bytes:
    return text.replace(b"\n", rng.choice([b"\r\n", b"\r"]))


def mixed_line_ends(text: bytes, rng: random.Random) -> bytes:
    return b"".join(line + rng.choice([b"\n", b"\r\n", b"\r"]) for line in text.split(b"\n"))


def other_encoding(text: bytes, rng: random.Random) -> bytes:
    return text.decode("latin-1").encode(
        rng.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "utf-8"])
    )


def lower_case(text: bytes, rng: random.Random) -> bytes:
    return text.lower()


def indent(text: bytes, rng: random.Random) -> bytes:
    return text.replace(b"\n", b"\n" + rng.choice([b" ", b"\t", b"> "]))


def repeat(text: bytes, rng: random.Random) -> bytes:
    return text.rstrip(b"\n") + text


def compress(text: bytes, rng: random.Random) -> bytes:
    return gzip.compress(text)


MUTATIONS = (
    *(drop_a_byte, drop_some_bytes, change_a_byte, join_lines, join_a_header_to_the_line_before, join_files_with_marks),
    *(
        insert,
        cut,
        cut_the_start,
        other_line_ends,
        mixed_line_ends,
        other_encoding,
        lower_case,
        indent,
        repeat,
        compress,
    ),
)


@pytest.fixture(scope="module")
def lines(request):
    data = request.path.parents[2] / "data" / "uniprot_sample_500.fasta.gz"
    return gzip.decompress(data.read_bytes()).replace(b"\r", b"").split(b"\n>")


@pytest.mark.parametrize("seed", range(200))
def test_no_header_of_a_mutated_file_is_lost(lines, tmp_path, seed):
    rng = random.Random(seed)
    text = b">" + b"\n>".join(rng.sample(lines, 12)).lstrip(b">") + b"\n"
    changes = rng.choices(MUTATIONS, k=rng.randrange(1, 4))
    for change in changes:
        text = change(text, rng) or b">"
    path = tmp_path / "a.fasta"
    path.write_bytes(text)
    policy = ResiduePolicy(rng.choice(["reject", "replace_with_x"]), gaps=rng.choice(["reject", "remove"]))
    cost_model = CostModel(ModelDimensions(6, 320, 20, True, True))
    settings = plan_settings(tmp_path, [InputFile("a", str(path))], [tmp_path / "shards"], cost_model, policy=policy)
    summary = deal_inputs(settings, None)
    rows = pq.read_table(tmp_path / "records.parquet").to_pylist()
    assert summary.records == len(rows) > 0
    assert all((row["reason"] is None) == (row["digest"] is not None) for row in rows)
    planned = [sequence for shard in list_shards(tmp_path / "shards") for _, sequence in read_shard(shard)]
    assert {letter for sequence in planned for letter in sequence} <= RESIDUE_TOKEN.keys() - {"-", "."}
    assert summary.rejected + len(planned) + summary.duplicates == len(rows)

    about = [row["detail"] for row in rows if row["reason"] in ABOUT_THE_FILE]
    if about:
        # Says what the file is, and why what a search for > may count is not here.
        assert all(str(path) in detail for detail in about)
        return
    titles = Counter((row["id"], row["description"]) for row in rows if row["position"])
    details = [row["detail"] for row in rows]
    lost, named = [], 0
    for line in plain_lines(text):
        title = line[line.index(b">") + 1 :]
        words = (*printable(title).split(maxsplit=1), "", "")[:2]
        if titles[words]:
            titles[words] -= 1
            continue
        shown = repr(title.decode("utf-8", "surrogateescape").strip()[:40])[1:-1]
        if any(shown in detail for detail in details):
            named += 1
        else:
            lost.append(title)
    assert not lost, [change.__name__ for change in changes]
    # What a search for > counts, but for the headers that are named and not read.
    assert sum(row["position"] > 0 for row in rows) == len(plain_lines(text)) - named


def plain_lines(text: bytes) -> list[bytes]:
    """The lines with a `>` in them, as `grep '>'` shows them."""
    if text.startswith(b"\x1f\x8b"):
        text = gzip.decompress(text)
    lines = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return [line for line in lines if b">" in line]
