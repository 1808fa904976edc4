"""Each figure is described once; what is drawn of it holds what it was given, and no more than a page can."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest

from esmflow.embedding.run_record import RunRecord
from esmflow.method import LongSequences
from esmflow.report.drawing import draw
from esmflow.report.embedding_map import EmbeddingMap
from esmflow.report.figures.embeddings import certificate_figure, colourings, map_figure
from esmflow.report.figures.records import disk_figure, flow_figure, flow_links, lengths_figure, reasons_figure
from esmflow.report.figures.slots import MOST_BARS, speed_figure, timeline_figure
from esmflow.report.manifest_counts import LONGEST, ManifestCounts, SampledRecord
from esmflow.report.page import WIDTHS
from esmflow.report.timeline import MOST_PIECES, MOST_SLOTS, Piece, drawable
from esmflow.verify.agreement import LIMITS, Agreement
from esmflow.verify.certificate import Certificate, VerifiedSequence

HOSTILE = "<script>&amp;</script>\"'"


@cache
def svg_of(figure, width="wide"):
    """What is drawn, as it goes into the page. figure: of a width."""
    (svg,) = draw([figure(WIDTHS[width]).to_dict()])
    assert isinstance(svg, str), svg
    return svg


def drawn(figure, width="wide"):
    return ElementTree.fromstring(svg_of(figure, width))


def elements(svg, tag):
    return svg.findall(f".//{{http://www.w3.org/2000/svg}}{tag}")


def texts(svg):
    return ["".join(element.itertext()) for element in elements(svg, "text")]


def marks(svg):
    """What a person can point at."""
    return [mark for tag in ("path", "circle") for mark in elements(svg, tag) if mark.get("aria-label")]


def said(svg):
    return [mark.get("aria-label") for mark in marks(svg)]


def size(bar):
    """Left, top, width and height of a bar."""
    numbers = map(float, re.findall(r"-?[\d.]+", bar.get("d")))
    left, top, width, height, _ = numbers
    return left, top, width, height


@pytest.fixture
def counts():
    lengths = np.bincount([30, 30, 70, 900, 2000], minlength=LONGEST + 2)
    return ManifestCounts(
        files={"a.faa": Counter(embedded=90, failed=4), "b.faa": Counter(rejected=6)},
        reasons=Counter(out_of_memory=4, empty_sequence=6),
        lengths={"whole": lengths, "rejected": lengths},
        computed=50,
        reused=30,
        failed=3,
    )


def test_the_flow_has_a_box_for_each_stage_and_keeps_every_record(counts):
    links = flow_links(counts)
    for stage in {stage for link in links for stage in link}:
        into = sum(number for (_, target), number in links.items() if target == stage)
        out = sum(number for (source, _), number in links.items() if source == stage)
        assert into == out or not into or not out
    svg = drawn(partial(flow_figure, counts))
    stages = {
        "Records": 100, "Unique": 83, "Duplicates": 11, "Computed": 50, "Reused": 30, "Embedded": 90, "Failed": 4,
        "Rejected": 6,
    }  # fmt: skip
    assert set(texts(svg)) == {f"{stage}{number}" for stage, number in stages.items()}
    ribbons = {f"{source} → {target}: {number}" for (source, target), number in links.items()}
    assert set(said(svg)) == ribbons | {f"{stage}: {number}" for stage, number in stages.items()}


@pytest.mark.parametrize("counted", [{"embedded": 1}, {"rejected": 3}])
def test_a_flow_of_one_stage_can_be_drawn(counted):
    counts = ManifestCounts(files={"a.faa": Counter(counted)}, computed=counted.get("embedded", 0))
    assert "Records" in texts(drawn(partial(flow_figure, counts)))[0]


def test_bars_have_their_sizes_and_values(counts):
    svg = drawn(partial(reasons_figure, counts))
    widths = [size(bar)[2] for bar in marks(svg)]
    assert max(widths) / min(widths) == pytest.approx(6 / 4, rel=0.01)
    assert {"empty_sequence", "out_of_memory", "6", "4"} == set(texts(svg))
    assert said(svg) == ["empty_sequence: 6 records", "out_of_memory: 4 records"]


def test_stacked_bars_stand_on_one_another_and_count_every_record(counts):
    svg = drawn(partial(lengths_figure, counts, 1022))
    assert sum(int(re.search(r": (\d+) ", text)[1]) for text in said(svg)) == 10
    assert "max_residues 1,022" in texts(svg)
    bars = {bar.get("aria-label").rpartition(" ")[2]: [] for bar in marks(svg)}
    for bar in marks(svg):
        bars[bar.get("aria-label").rpartition(" ")[2]].append(size(bar))
    for below, above in zip(bars["whole"], bars["rejected"], strict=True):
        assert above[1] + above[3] == pytest.approx(below[1], abs=0.1)


def test_names_from_the_input_are_text_and_nothing_else():
    sample = [SampledRecord(f"{HOSTILE}.faa", HOSTILE, 50, "s", row) for row in range(5)]
    sample.append(SampledRecord("b.faa", "x", 50, "s", 5))
    mapped = EmbeddingMap("mean_layer6", np.arange(12.0).reshape(6, 2), (0.5, 0.25))
    (by_file, _) = colourings(sample, [f"{HOSTILE}.faa", "b.faa"], ["one"])
    figure = partial(map_figure, mapped, sample, by_file, 20_000)
    assert HOSTILE not in svg_of(figure)
    svg = drawn(figure)
    assert [text.startswith(f"{HOSTILE}\n50 residues\n") for text in said(svg)] == [True] * 5 + [False]
    assert f"{HOSTILE}.faa".rpartition("/")[2] in texts(svg)
    assert not elements(svg, "script")
    bars = drawn(partial(disk_figure, {HOSTILE: 10}))
    assert texts(bars)[0] == HOSTILE


def test_many_files_share_a_colour_beyond_the_largest():
    sample = [SampledRecord(f"{n}.faa", "x", 50, "s", 0) for n in range(20) for _ in range(1 + n % 7)]
    mapped = EmbeddingMap("mean_layer6", np.random.default_rng(0).normal(size=(len(sample), 2)), (0.5, 0.25))
    (by_file, _) = colourings(sample, [f"{n}.faa" for n in range(20)], ["one"])
    svg = drawn(partial(map_figure, mapped, sample, by_file, 20_000))
    assert len(marks(svg)) == len(sample)
    assert len({point.get("fill") for point in marks(svg)}) == 8
    assert "other input files" in texts(svg)


def test_a_map_is_coloured_by_sample_file_and_length():
    sample = [
        SampledRecord(f"{n % 4}.faa", "x", length, "s", 0, f"sample {n % 2}")
        for n, length in enumerate([5, 5, 8, 9, 20, 30, 200, 300, 400, 1000])
    ]
    by_sample, by_file, by_length = colourings(sample, [f"{n}.faa" for n in range(4)], ["sample 0", "sample 1"])
    assert (by_sample.what, by_file.what, by_length.what) == ("sample", "input file", "length")
    assert by_sample.values == ["sample 0", "sample 1"] * 5
    assert by_file.values == [f"{n % 4}.faa" for n in range(10)]
    assert Counter(by_length.values) == dict.fromkeys(by_length.shades, 2)
    for value, record in zip(by_length.values, sample, strict=True):
        low, high = (int(edge.replace(",", "")) for edge in value.removesuffix(" residues").split("–"))
        assert low <= record.length <= high
    # One length is one class.
    (only,) = colourings([replace(record, length=7) for record in sample], ["a"], ["b"])
    assert set(only.values) == {"7 residues"} == only.shades.keys()


def test_points_far_from_all_others_do_not_squeeze_the_rest_and_are_counted():
    points = np.random.default_rng(0).normal(size=(100, 2))
    points[3] = 1000, -1000
    mapped = EmbeddingMap("mean_layer6", points, (0.5, 0.25))
    assert mapped.moved == 1
    assert np.abs(mapped.framed).max() < 10
    # A second group that is far away is no outlier.
    points[:20] += 1000
    mapped = EmbeddingMap("mean_layer6", points, (0.5, 0.25))
    assert mapped.moved == 0
    assert mapped.framed is points


def test_every_other_figure_can_be_drawn():
    pieces = [
        Piece("GPU 0 on a", "0", kind, 10.0 * n, 10.0 * n + 9, "work") for n, kind in enumerate(("load", "compute"))
    ]
    svg = drawn(partial(timeline_figure, pieces))
    assert {"load", "compute", "GPU 0 on a", "0"} <= set(texts(svg))
    assert said(svg) == ["group 0, load 9.00 s\nwork", "group 0, compute 9.00 s\nwork"]
    runs = [RunRecord(group=str(n), residues_per_second=1000.0 * n, peak_memory_bytes=n << 30) for n in (1, 2)]
    assert {"1,000", "2,000", "1", "2"} <= set(texts(drawn(partial(speed_figure, runs))))
    assert {"1.5 GB", "10 bytes", "store", "plan"} == set(
        texts(drawn(partial(disk_figure, {"store": 1_500_000_000, "plan": 10})))
    )
    sequence = VerifiedSequence(
        digest="", file="a.faa", record=1, id=HOSTILE, length=10, precision="fp32", segment="", row=0, position=0,
        passed=True, outputs={"mean_layer6": Agreement(1.0, 0.0, 1.0)},
    )  # fmt: skip
    sequences = (sequence, replace(sequence, length=20))
    certificate = Certificate(passed=True, sequences=sequences, limits={"fp32": LIMITS["fp32"]})
    svg = drawn(partial(certificate_figure, certificate, LongSequences(15)))
    assert len(marks(svg)) == 2
    assert "limit for fp32: cosine 0.99999" in texts(svg)
    assert {"10⁻¹⁵", "10⁻⁵"} & set(texts(svg))
    # The axis has the residues that were compared, and begins where they do.
    assert {"10", "15"} <= set(texts(svg))
    assert not {"0", "20"} & set(texts(svg))


def test_figures_stay_small_with_ten_thousand_groups_and_twenty_thousand_points():
    runs = [RunRecord(group=str(n), residues_per_second=1e3 + n, peak_memory_bytes=n << 20) for n in range(10_000)]
    svg = drawn(partial(speed_figure, runs))
    assert len(marks(svg)) <= 2 * MOST_BARS
    assert "group 0–83\n1,042 residues/s" in said(svg)
    pieces = [
        Piece(f"GPU {n % 100}", str(n), kind, 60.0 * (n // 100) + 20 * i, 60.0 * (n // 100) + 20 * i + 20, "work")
        for n in range(10_000)
        for i, kind in enumerate(("load", "compute", "compute"))
    ]
    few = drawable(pieces)
    assert len(few) <= MOST_PIECES
    assert len({piece.slot for piece in few}) == MOST_SLOTS
    sample = [SampledRecord(f"{n % 9}.faa", f"sp|A0A{n:07}|A0A{n:07}_HUMAN", 50, "s", n) for n in range(20_000)]
    mapped = EmbeddingMap("mean_layer6", np.random.default_rng(0).normal(size=(20_000, 2)), (0.5, 0.25))
    by_file, _ = colourings(sample, [f"{n}.faa" for n in range(9)], ["one"])
    points = partial(map_figure, mapped, sample, by_file, 20_000)
    figures = [points, partial(timeline_figure, few), partial(speed_figure, runs)]
    assert sum(len(svg_of(figure, width)) for figure in figures for width in WIDTHS) < 5_000_000
    assert len(marks(drawn(points))) == len(sample)
    assert len(marks(drawn(points, "narrow"))) == 2000


def test_every_second_of_many_pieces_is_drawn_where_it_was_spent():
    pieces = [Piece("GPU 0", "0", ("load", "compute")[n // 2500], n, n + 1.0, "work") for n in range(5000)]
    few = drawable(pieces)
    assert len(few) == MOST_PIECES
    assert sum(piece.seconds for piece in few) == pytest.approx(5000)
    assert {piece.kind for piece in few if piece.ended <= 2500} == {"load"}
    assert {piece.kind for piece in few if piece.started >= 2500} == {"compute"}
