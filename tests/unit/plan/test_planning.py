"""A plan: every record has a row, every unique sequence is in one shard, and every group has the same work."""

import itertools
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stage_settings
import torch
from made_up import proteins, random_model, sample_proteins, stored_sequences, write_fasta
from stage_settings import plan_settings
from torch.utils.flop_counter import FlopCounterMode

from esmflow.checkpoint.models import ModelDimensions
from esmflow.inputs.fasta import read_records
from esmflow.inputs.residues import ResiduePolicy, sequence_digest
from esmflow.inputs.sheet import InputFile
from esmflow.method import LongSequences
from esmflow.plan import planning
from esmflow.plan.cost import CostModel
from esmflow.plan.planning import assign_files_round_robin, deal_inputs
from esmflow.plan.shards import ShardError, add_to_shard, list_shards, read_shard, write_shard

ESM2_8M = ModelDimensions(6, 320, 20, True, True)
ESM2_3B = ModelDimensions(36, 2560, 40, True, True)
TRUNCATED_3B = CostModel(ESM2_3B, LongSequences(1022))
STRICT = ResiduePolicy()


class Planned:
    """A plan on disk, read back."""

    def __init__(self, folder, files, groups, cost_model=TRUNCATED_3B, policy=STRICT, stored=None, **options):
        self.folders = [folder / f"group-{g}" for g in range(groups)]
        self.records_path = folder / "records.parquet"
        inputs = [InputFile(f"sample {n}", str(file)) for n, file in enumerate(files)]
        settings = plan_settings(folder, inputs, self.folders, cost_model, policy=policy, **options)
        self.summary = deal_inputs(settings, stored)
        self.cost_model = cost_model

    @property
    def records(self) -> list[dict]:
        return pq.read_table(self.records_path).to_pylist()

    @property
    def groups(self) -> list[list[str]]:
        """The sequences of each group, in order, each under the digest that is its own."""
        groups = []
        for folder in self.folders:
            pairs = list(itertools.chain.from_iterable(read_shard(shard) for shard in list_shards(folder)))
            assert all(digest == sequence_digest(sequence) for digest, sequence in pairs)
            groups.append([sequence for _, sequence in pairs])
        return groups

    @property
    def costs(self) -> list[float]:
        """The groups' costs, from what is on disk."""
        costs = [sum(self.cost_model.cost(len(s)) for s in group) for group in self.groups]
        assert costs == pytest.approx([group.cost for group in self.summary.groups])
        return costs

    @property
    def spread(self) -> float:
        return (max(self.costs) - min(self.costs)) / min(self.costs)


@pytest.fixture(scope="module")
def sample(request):
    return request.path.parents[2] / "data" / "uniprot_sample_500.fasta.gz"


def titled(sequences, name="p"):
    return [(f"{name}{i}", sequence) for i, sequence in enumerate(sequences)]


# Assignment of files


def test_files_are_dealt_in_order():
    assert assign_files_round_robin(["a", "b", "c", "d", "e"], 2) == [["a", "c", "e"], ["b", "d"]]


def test_more_groups_than_files_leaves_groups_empty():
    assert assign_files_round_robin(["a", "b"], 4) == [["a"], ["b"], [], []]
    assert assign_files_round_robin([], 2) == [[], []]


@pytest.mark.parametrize("groups", [0, -1])
def test_a_number_of_groups_below_one_is_refused(groups):
    with pytest.raises(ValueError, match=f"groups: {groups} is not a positive number"):
        assign_files_round_robin(["a"], groups)


def test_round_robin_keeps_files_whole(tmp_path):
    contents = [proteins(20, 30, 200, seed) for seed in range(5)]
    files = [write_fasta(tmp_path / f"{i}.fasta", titled(c)) for i, c in enumerate(contents)]
    planned = Planned(tmp_path, files, 2, assignment="round_robin")
    assert [Counter(group) for group in planned.groups] == [
        Counter(contents[0] + contents[2] + contents[4]),
        Counter(contents[1] + contents[3]),
    ]


def test_round_robin_over_several_windows_keeps_files_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "WINDOW_RESIDUES", 1000)
    contents = [proteins(20, 30, 200, seed) for seed in range(3)]
    files = [write_fasta(tmp_path / f"{i}.fasta", titled(c)) for i, c in enumerate(contents)]
    planned = Planned(tmp_path, files, 2, assignment="round_robin", shard_residues=300)
    assert [Counter(group) for group in planned.groups] == [Counter(contents[0] + contents[2]), Counter(contents[1])]


def test_a_sequence_in_two_files_goes_with_the_first_under_round_robin(tmp_path):
    files = [write_fasta(tmp_path / f"{i}.fasta", [("p", "MKVLAG")]) for i in range(2)]
    assert Planned(tmp_path, files, 2, assignment="round_robin").groups == [["MKVLAG"], []]


# Balance


@pytest.mark.parametrize("groups", [2, 3, 4, 8])
@pytest.mark.parametrize("dimensions", [ESM2_8M, ESM2_3B], ids=["8M", "3B"])
@pytest.mark.parametrize("max_residues", [1022, None], ids=["truncated", "whole"])
def test_groups_differ_by_less_than_two_percent_in_cost(tmp_path, sample, groups, dimensions, max_residues):
    planned = Planned(tmp_path, [sample], groups, CostModel(dimensions, LongSequences(max_residues)))
    assert planned.spread < 0.02


@pytest.mark.parametrize("groups", [2, 3, 4, 8])
def test_every_group_sees_the_same_lengths(tmp_path, sample, groups):
    planned = Planned(tmp_path, [sample], groups)
    quantiles = [np.quantile([len(s) for s in group], [0.25, 0.5, 0.75]) for group in planned.groups]
    assert np.ptp(quantiles, axis=0).max() < 30
    sizes = [len(group) for group in planned.groups]
    assert max(sizes) - min(sizes) <= 2


def test_every_shard_of_a_group_sees_the_same_lengths(tmp_path, sample):
    planned = Planned(tmp_path, [sample], 2, shard_residues=20_000)
    for folder in planned.folders:
        shards = [[len(s) for _, s in read_shard(shard)] for shard in list_shards(folder)]
        assert len(shards) > 4
        assert np.ptp([np.median(lengths) for lengths in shards]) < 60


def test_windows_are_dealt_one_by_one_and_groups_still_balance(tmp_path, sample, monkeypatch):
    monkeypatch.setattr(planning, "WINDOW_RESIDUES", 20_000)
    whole = sorted(set(sample_proteins(sample.parent)))
    planned = Planned(tmp_path, [sample], 3, shard_residues=5000)
    assert sum(group.shards for group in planned.summary.groups) > 9
    assert sorted(itertools.chain(*planned.groups)) == whole
    assert planned.spread < 0.02


def test_shards_that_a_window_does_not_fill_are_gone_on_with_in_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "WINDOW_RESIDUES", 100)
    files = [write_fasta(tmp_path / "a.fasta", titled(proteins(200, 50, 50)))]
    planned = Planned(tmp_path, files, 4, shard_residues=1000)
    for folder in planned.folders:
        assert [sum(len(s) for _, s in read_shard(shard)) for shard in list_shards(folder)] == [1000, 1000, 500]


def test_several_workers_share_what_many_groups_are_dealt_window_by_window(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "WINDOW_RESIDUES", 1000)
    files = [write_fasta(tmp_path / "a.fasta", titled(proteins(400, 50, 50)))]
    planned = Planned(tmp_path, files, 4, shard_residues=1000, workers=2)
    # A share of a window is five sequences: five shards, which all twenty windows go on with.
    for folder in planned.folders:
        sizes = [sum(len(s) for _, s in read_shard(shard)) for shard in list_shards(folder)]
        assert len(sizes) == 5
        assert max(sizes) <= 1000
    assert sorted(itertools.chain(*planned.groups)) == sorted({s for s in proteins(400, 50, 50)})


@pytest.mark.parametrize("residues", [10, 300])
def test_the_cost_is_what_a_forward_pass_takes(residues):
    model = random_model(layers=3, hidden=64, heads=4)
    # The language-model head is not part of embedding.
    model.lm_head = torch.nn.Identity()
    tokens = model.alphabet.get_batch_converter()([("", "M" * residues)])[2]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens)
    cost = CostModel(ModelDimensions(3, 64, 4, False, False)).cost(residues)
    assert cost == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_a_truncated_sequence_costs_what_is_left_of_it():
    cost = CostModel(ESM2_3B, LongSequences(1022)).cost
    assert cost(30_000) == cost(1022) > cost(1021)
    assert CostModel(ESM2_3B).cost(30_000) > 29 * cost(1022)


@pytest.mark.parametrize(
    ("long", "residues"),
    [(LongSequences(100), 3 * 100 + 50), (LongSequences(100, 20), 3 * 170 + 50), (LongSequences(), 3 * 170 + 50)],
    ids=["truncated", "windows", "whole"],
)
def test_the_residues_of_a_group_are_those_that_its_job_will_count(tmp_path, long, residues):
    files = [write_fasta(tmp_path / "a.fasta", titled([*proteins(3, 170, 170), *proteins(1, 50, 50)]))]
    planned = Planned(tmp_path, files, 2, CostModel(ESM2_8M, long))
    assert sum(group.residues for group in planned.summary.groups) == residues
    assert planned.summary.to_embed.residues == residues


@pytest.mark.parametrize("residues", [1, 1022, 1023, 1822, 1823, 30_000])
def test_a_sequence_in_windows_costs_what_its_windows_do(residues):
    windows = CostModel(ESM2_3B, LongSequences(1022, 222))
    whole = CostModel(ESM2_3B).cost
    pieces = windows.long.pieces(residues)
    assert windows.cost(residues) == pytest.approx(sum(whole(end - begin) for begin, end in pieces))
    assert windows.cost(np.array([residues])).tolist() == [windows.cost(residues)]


# What is in a plan


def test_every_unique_sequence_is_in_exactly_one_shard(tmp_path, sample):
    planned = Planned(tmp_path, [sample], 4, shard_residues=20_000)
    planned_sequences = list(itertools.chain(*planned.groups))
    assert Counter(planned_sequences) == Counter(set(sample_proteins(sample.parent)))
    assert planned.summary.records == 500
    assert planned.summary.duplicates == 2
    assert [g.sequences for g in planned.summary.groups] == [len(g) for g in planned.groups]
    assert [g.residues for g in planned.summary.groups] == [sum(min(len(s), 1022) for s in g) for g in planned.groups]
    assert [g.shards for g in planned.summary.groups] == [len(list_shards(folder)) for folder in planned.folders]


def test_shards_keep_to_their_size(tmp_path):
    files = [write_fasta(tmp_path / "a.fasta", titled(proteins(300, 10, 90)))]
    planned = Planned(tmp_path, files, 2, shard_residues=1000)
    for folder in planned.folders:
        sizes = [sum(len(s) for _, s in read_shard(shard)) for shard in list_shards(folder)]
        assert len(sizes) > 5
        # The longest sequence more, at most: shards are dealt from, not filled up.
        assert max(sizes) <= 1000 + 90


def test_several_workers_of_a_job_have_four_shards_each_where_there_are_sequences_enough(tmp_path, sample):
    alone, together = (Planned(tmp_path / str(n), [sample], 2, workers=n) for n in (1, 4))
    assert [group.shards for group in alone.summary.groups] == [1, 1]
    assert [group.shards for group in together.summary.groups] == [16, 16]
    few = Planned(tmp_path / "few", [write_fasta(tmp_path / "a.fasta", titled(proteins(3, 30, 40)))], 1, workers=4)
    assert few.summary.groups[0].shards == 3


def test_a_sequence_longer_than_a_shard_has_a_shard_of_its_own(tmp_path):
    giants = proteins(3, 5000, 6000)
    planned = Planned(tmp_path, [write_fasta(tmp_path / "a.fasta", titled(giants))], 1, shard_residues=100)
    assert [len(list(read_shard(shard))) for shard in list_shards(planned.folders[0])] == [1, 1, 1]


def test_equal_sequences_of_all_files_are_planned_once(tmp_path):
    first = write_fasta(tmp_path / "a.fasta", [("a", "MKVLAG"), ("b", "mkvl ag*"), ("c", "EDRTKQ")])
    second = write_fasta(tmp_path / "b.fasta", [("d", "EDRTKQ"), ("e", "MKVLAG"), ("f", "NFYMHW")])
    planned = Planned(tmp_path, [first, second], 2)
    assert sorted(itertools.chain(*planned.groups)) == ["EDRTKQ", "MKVLAG", "NFYMHW"]
    assert (planned.summary.records, planned.summary.duplicates) == (6, 3)
    assert len({r["digest"] for r in planned.records if r["id"] in "abe"}) == 1


def test_what_the_store_holds_is_not_planned_again(tmp_path, sample):
    everything = sorted(set(sample_proteins(sample.parent)))
    old, older = everything[::3], everything[1::3]
    parts = {"segment old": old, "segment older": older, "segment of others": ["AAAA"], "segment without rows": []}
    planned = Planned(tmp_path, [sample], 2, stored=stored_sequences(tmp_path / "store", parts))
    assert sorted(itertools.chain(*planned.groups)) == everything[2::3]
    assert planned.summary.stored == len(old) + len(older)
    assert planned.summary.stored_segments == ("segment old", "segment older")
    assert planned.summary.duplicates == 2
    assert len(planned.records) == 500


def test_a_stored_sequence_that_comes_twice_is_stored_once_and_a_duplicate_once(tmp_path):
    file = write_fasta(tmp_path / "a.fasta", titled(["MKV", "MKV", "LAG"]))
    planned = Planned(tmp_path, [file], 1, stored=stored_sequences(tmp_path / "store", {"segment": ["MKV"]}))
    assert (planned.summary.stored, planned.summary.duplicates, planned.groups) == (1, 1, [["LAG"]])


def test_a_plan_does_not_depend_on_the_order_of_the_input(tmp_path, sample):
    records = [(f"p{i}", sequence) for i, sequence in enumerate(sample_proteins(sample.parent))]
    shards = []
    for seed in (0, 1):
        shuffled = [records[i] for i in np.random.default_rng(seed).permutation(len(records))]
        folder = tmp_path / str(seed)
        files = [write_fasta(folder / f"{n}.fasta", shuffled[n::3]) for n in range(3)]
        planned = Planned(folder, files, 3, shard_residues=20_000)
        shards.append([[path.read_bytes() for path in list_shards(f)] for f in planned.folders])
    assert shards[0] == shards[1]


def test_more_groups_than_sequences_leaves_groups_empty(tmp_path):
    planned = Planned(tmp_path, [write_fasta(tmp_path / "a.fasta", titled(["MKV", "LAGG"]))], 5)
    assert sorted(planned.groups) == [[], [], [], ["LAGG"], ["MKV"]]
    assert all(folder.is_dir() for folder in planned.folders)


def test_no_sequence_at_all_is_a_plan_too(tmp_path):
    planned = Planned(tmp_path, [write_fasta(tmp_path / "a.fasta", [("a", ""), ("b", "MJ")])], 2)
    assert planned.groups == [[], []]
    assert (planned.summary.records, planned.summary.rejected) == (2, 2)


def test_shards_of_an_earlier_plan_are_gone(tmp_path):
    many = write_fasta(tmp_path / "many.fasta", titled(proteins(50, 50, 50)))
    Planned(tmp_path, [many], 2, shard_residues=100)
    planned = Planned(tmp_path, [write_fasta(tmp_path / "few.fasta", titled(["MKV"]))], 2)
    assert sorted(planned.groups) == [[], ["MKV"]]


def test_an_input_that_is_not_there_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        Planned(tmp_path, [tmp_path / "none.fasta"], 1)
    assert not (tmp_path / "records.parquet").exists()


def test_a_plan_does_not_depend_on_the_number_of_processes(tmp_path, sample, monkeypatch):
    monkeypatch.setattr(planning, "BYTES_PER_PROCESS", 1)
    monkeypatch.setattr("esmflow.inputs.fasta.BLOCK_BYTES", 5000)
    (tmp_path / "bad.fasta").write_text("note\n>a\nMJV\n>b\n>c\nmkv*\n")
    (tmp_path / "table.tsv").write_text("id\tsequence\nx\tMKVLAG\ny\tMKV\n")
    files = [tmp_path / "bad.fasta", sample, tmp_path / "table.tsv"]
    plans = [Planned(tmp_path / str(n), files, 3, shard_residues=20_000, processes=n) for n in (1, 3)]
    assert plans[0].summary == plans[1].summary
    assert plans[0].records == plans[1].records
    contents = [[[path.read_bytes() for path in list_shards(f)] for f in planned.folders] for planned in plans]
    assert contents[0] == contents[1]


def test_repeats_do_not_empty_the_windows_they_are_in(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "WINDOW_RESIDUES", 1000)
    sequences = [sequence for s in proteins(100, 50, 50) for sequence in [s] * 9]
    planned = Planned(tmp_path, [write_fasta(tmp_path / "a.fasta", titled(sequences))], 1, shard_residues=1000)
    assert Counter(planned.groups[0]) == Counter(set(sequences))
    assert planned.summary.duplicates == 800
    sizes = [sum(len(s) for _, s in read_shard(shard)) for shard in list_shards(planned.folders[0])]
    assert len(sizes) <= 6
    assert min(sizes[:-1]) >= 875


# The table of records


def test_every_record_has_a_row_in_input_order(tmp_path, monkeypatch):
    monkeypatch.setattr("esmflow.plan.record_table.ROWS_PER_GROUP", 7)
    files = [write_fasta(tmp_path / f"{i}.fasta", titled(proteins(10, 5, 50, i), f"f{i}_")) for i in range(3)]
    planned = Planned(tmp_path, files, 2)
    assert pq.ParquetFile(planned.records_path).num_row_groups == 5
    assert [(r["sample"], r["file"], r["position"], r["id"]) for r in planned.records] == [
        (f"sample {i}", str(files[i]), n + 1, f"f{i}_{n}") for i in range(3) for n in range(10)
    ]
    by_digest = {sequence_digest(s): len(s) for group in planned.groups for s in group}
    assert all(by_digest[row["digest"]] == row["length"] and row["reason"] is None for row in planned.records)


def test_rejected_records_have_rows_with_a_reason_and_no_digest(tmp_path):
    (tmp_path / "bad.fasta").write_text(f"note\n>a\nMJV\n>b\n>c\nMKV*\n>d\n{'ACGT' * 30}\n>e\n{'MKVLA' * 30}\n")
    (tmp_path / "cut.fasta.gz").write_bytes(b">a\nMKV\n")
    (tmp_path / "empty.fasta").write_bytes(b"")
    files = [tmp_path / name for name in ("bad.fasta", "cut.fasta.gz", "empty.fasta")]
    planned = Planned(tmp_path, files, 2, policy=ResiduePolicy(max_residues=130))
    rows = [(r["id"], r["reason"], r["digest"] is not None) for r in planned.records]
    assert rows == [
        ("", "text_before_header", False),
        ("a", "invalid_residue", False),
        ("b", "empty_sequence", False),
        ("c", None, True),
        ("d", "nucleotide_sequence", False),
        ("e", "too_long", False),
        ("", "unreadable_file", False),
        ("", "empty_file", False),
    ]
    assert all(r["detail"] for r in planned.records if r["reason"])
    assert (planned.summary.records, planned.summary.rejected) == (8, 7)
    assert sorted(planned.groups) == [[], ["MKV"]]


def test_a_rejected_record_is_one_line_of_the_log_whatever_its_id_holds(tmp_path, caplog):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"id": ["a\n2026 ERROR \x1b[2J\tb"], "sequence": ["M1"]}), path)
    with caplog.at_level("INFO"):
        Planned(tmp_path, [path], 1)
    (line,) = [message for message in caplog.messages if message.startswith("rejected")]
    assert line == rf"rejected {path}, record 1 (a\n2026 ERROR \x1b[2J\tb): invalid_residue: '1' at residue 2"


def test_long_records_are_rejected_only_where_there_is_a_limit(tmp_path):
    file = write_fasta(tmp_path / "a.fasta", titled(["MKVLA" * 300, "MKV"]))
    kept = Planned(tmp_path, [file], 1, TRUNCATED_3B)
    assert sorted(kept.groups[0], key=len) == ["MKV", "MKVLA" * 300]
    rejected = Planned(tmp_path, [file], 1, policy=ResiduePolicy(max_residues=1022))
    assert rejected.groups == [["MKV"]]
    assert [r["reason"] for r in rejected.records] == ["too_long", None]


# Shards


def test_a_shard_reads_as_it_was_written(tmp_path):
    pairs = [(sequence_digest(s), s) for s in ("MKV", "UZBO.-X", "A" * 30_000)]
    write_shard(tmp_path / "shard-00000.fasta", pairs)
    assert list(read_shard(tmp_path / "shard-00000.fasta")) == pairs


def test_a_shard_is_fasta_that_anyone_can_read(tmp_path):
    write_shard(tmp_path / "shard.fasta", [(sequence_digest("MKV"), "MKV")])
    (record,) = read_records(tmp_path / "shard.fasta")
    assert (record.id, record.sequence) == (sequence_digest("MKV").hex(), "MKV")


def test_shards_are_listed_in_order_and_nothing_else_is(tmp_path):
    for number in (10, 2, 0):
        write_shard(tmp_path / f"shard-{number:05d}.fasta", [])
    (tmp_path / "other.txt").touch()
    assert [p.name for p in list_shards(tmp_path)] == ["shard-00000.fasta", "shard-00002.fasta", "shard-00010.fasta"]
    assert list_shards(tmp_path / "none") == []


def test_a_shard_in_columns_is_the_same_file(tmp_path):
    pairs = [(sequence_digest(s), s) for s in ("MKV", "UZBO.-X", "A" * 3000)]
    write_shard(tmp_path / "shard-00000.fasta", pairs)
    digests = np.array([list(digest) for digest, _ in pairs], np.uint8)
    sequences = pa.array([s.encode() for _, s in pairs], pa.large_binary())
    add_to_shard(tmp_path / "shard-00001.fasta", digests, sequences)
    add_to_shard(tmp_path / "shard-00002.fasta", digests[:0], sequences[:0])
    add_to_shard(tmp_path / "shard-00003.fasta", digests[1:], sequences[1:])
    for part in (slice(0, 1), slice(1, 3)):
        add_to_shard(tmp_path / "shard-00004.fasta", digests[part], sequences[part])
    contents = [path.read_bytes() for path in list_shards(tmp_path)]
    assert contents[1] == contents[4] == contents[0]
    assert contents[2] == b""
    assert contents[0].endswith(contents[3])


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-3], lambda data: data.replace(b"MKV", b"MKL"), lambda d: d[:40]]
)
def test_a_shard_that_is_not_as_it_was_written_is_noticed(tmp_path, damage):
    path = tmp_path / "shard-00000.fasta"
    write_shard(path, [(sequence_digest(s), s) for s in ("MKV", "EDRTKQ")])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ShardError, match=r"shard-00000\.fasta: damaged at >.*run again with --forcerun plan"):
        list(read_shard(path))


# Memory

PLAN_AND_MEASURE = """
import json, re, sys, time
from pathlib import Path
import pyarrow
from esmflow.plan import planning
from esmflow.plan.cost import CostModel
from esmflow.checkpoint.models import ModelDimensions
from stage_settings import plan_settings

def peak():  # KiB; unlike ru_maxrss it does not begin with the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

folder = Path(sys.argv[1])
planning.WINDOW_RESIDUES = 2_000_000
# With the first array comes pandas, where no step keeps it away.
pyarrow.array([])
before = peak()
started = time.process_time()
settings = plan_settings(
    folder,
    [planning.InputFile("s", str(folder / "large.fasta"))],
    [folder / f"group-{g}" for g in range(int(sys.argv[2]))],
    CostModel(ModelDimensions(36, 2560, 40, True, True)),
    shard_residues=500_000,
)
summary = planning.deal_inputs(settings)
residues = sum(group.residues for group in summary.groups)
seconds = time.process_time() - started
print(json.dumps({"residues": residues, "growth": (peak() - before) * 1024, "seconds": seconds}))
"""


def plan_and_measure(folder, groups):
    command = [sys.executable, "-c", PLAN_AND_MEASURE, str(folder), str(groups)]
    scripts, support = str(planning.__file__).rsplit("/", 3)[0], str(stage_settings.__file__).rpartition("/")[0]
    environment = {"PYTHONPATH": f"{scripts}:{support}"}
    return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with a FASTA file of 80 million residues."""
    folder = tmp_path_factory.mktemp("large")
    random = np.random.default_rng(0)
    letters = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", np.uint8)
    with open(folder / "large.fasta", "wb") as handle:
        for number in range(4000):
            handle.write(b">p%d\n%s\n" % (number, letters[random.integers(0, 20, 20_000, np.uint8)].tobytes()))
    return folder


def test_planning_reads_a_large_file_in_bounded_memory(large):
    found = plan_and_measure(large, 4)
    assert found["residues"] == 80_000_000
    # Two million residues wait in the window; the rest, 28 to 34 MB, is row buffers and the Parquet writer.
    assert found["growth"] < 50_000_000


def test_ten_thousand_groups_take_no_more_memory_than_a_few_and_little_more_time(large):
    few, many = plan_and_measure(large, 4), plan_and_measure(large, 10_000)
    print(f"4 groups: {few}; 10,000 groups: {many}")
    assert many["residues"] == 80_000_000
    # The groups themselves are 10,000 objects, folders and lines; what waits to be dealt is the same.
    assert many["growth"] - few["growth"] < 25_000_000
    assert many["seconds"] < few["seconds"] + 10


def test_where_there_is_less_to_do_than_was_guessed_the_last_groups_stay_empty(tmp_path):
    write_fasta(tmp_path / "a.fasta", [(f"p{n}", protein) for n, protein in enumerate(proteins(40, 50, 60))])
    (tmp_path / "all").mkdir()
    everything = Planned(tmp_path / "all", [tmp_path / "a.fasta"], groups=4)
    cost = sum(group.cost for group in everything.summary.groups)
    (tmp_path / "few").mkdir()
    few = Planned(tmp_path / "few", [tmp_path / "a.fasta"], groups=4, least_cost=cost / 2.5)
    assert [bool(group) for group in few.groups] == [True, True, False, False]
    assert sorted(itertools.chain(*few.groups)) == sorted(itertools.chain(*everything.groups))
    (tmp_path / "one").mkdir()
    one = Planned(tmp_path / "one", [tmp_path / "a.fasta"], groups=4, least_cost=2 * cost)
    assert [bool(group) for group in one.groups] == [True, False, False, False]
