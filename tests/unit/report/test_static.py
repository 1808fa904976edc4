"""The figures for Snakemake's own report show what plotly's do, without a browser."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from esmflow.embed.run_record import RunRecord
from esmflow.report.embedding_map import EmbeddingMap
from esmflow.report.figures import (
    certificate_figure,
    disk_figure,
    flow_figure,
    lengths_figure,
    map_figure,
    reasons_figure,
    speed_figure,
    timeline_figure,
)
from esmflow.report.manifest_counts import LONGEST, ManifestCounts, SampledRecord
from esmflow.report.page import TEMPLATES
from esmflow.report.static import static_figure, static_message
from esmflow.report.timeline import Piece
from esmflow.verify.agreement import LIMITS, Agreement
from esmflow.verify.certificate import Certificate, VerifiedSequence

STYLE = (TEMPLATES / "page.css").read_text()
HOSTILE = "<script>&amp;</script>\"'"


def drawn(figure):
    return ElementTree.fromstring(static_figure(figure, STYLE))


def elements(svg, tag):
    return svg.findall(f".//{{http://www.w3.org/2000/svg}}{tag}")


def texts(svg):
    return [element.text for element in elements(svg, "text")]


def bars(svg):
    """All boxes but the background."""
    return elements(svg, "rect")[1:]


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
    figure = flow_figure(counts)
    labels = dict(label.split("<br>") for label in figure.data[0].node.label)
    assert labels == {
        "Records": "100", "Unique": "83", "Duplicates": "11", "Computed": "50", "Reused": "30",
        "Embedded": "90", "Failed": "4", "Rejected": "6",
    }  # fmt: skip
    link = figure.data[0].link
    for node in range(len(labels)):
        into = sum(value for value, target in zip(link.value, link.target) if target == node)
        out = sum(value for value, source in zip(link.value, link.source) if source == node)
        assert into == out or not into or not out
    svg = drawn(figure)
    assert len(bars(svg)) == len(labels)
    assert len(elements(svg, "path")) == len(link.value)
    assert {*labels, *labels.values()} == set(texts(svg))


def test_bars_have_their_sizes_and_values(counts):
    svg = drawn(reasons_figure(counts))
    widths = [float(bar.get("width")) for bar in bars(svg)]
    assert max(widths) / min(widths) == pytest.approx(6 / 4, rel=0.01)
    assert {"empty sequence", "out of memory", "6", "4"} == set(texts(svg))


def test_stacked_bars_stand_on_one_another_and_count_every_record(counts):
    figure = lengths_figure(counts, 1022)
    assert [sum(trace.y) for trace in figure.data] == [5, 5]
    svg = drawn(figure)
    assert "max_residues 1,022" in texts(svg)
    # Two boxes of the legend, then four bars of each kind: equal bars, so tops and bottoms meet.
    whole, rejected = bars(svg)[2:6], bars(svg)[6:]
    for below, above in zip(whole, rejected, strict=True):
        assert float(above.get("y")) + float(above.get("height")) == pytest.approx(float(below.get("y")), abs=0.1)


def test_names_from_the_input_are_text_and_nothing_else():
    sample = [SampledRecord(f"{HOSTILE}.faa", HOSTILE, 50, "s", row) for row in range(5)]
    mapped = EmbeddingMap("mean_layer6", np.arange(10.0).reshape(5, 2), (0.5, 0.25))
    figure = map_figure(mapped, sample, [f"{HOSTILE}.faa"])
    assert HOSTILE not in figure.to_json()
    svg = drawn(figure)
    assert len(elements(svg, "circle")) == 5
    assert f"{HOSTILE}.faa".rpartition("/")[2] in texts(svg)
    assert not elements(svg, "script")
    assert HOSTILE in texts(ElementTree.fromstring(static_message(HOSTILE, STYLE)))


def test_many_files_share_a_colour_beyond_the_largest():
    sample = [SampledRecord(f"{n}.faa", "x", 50, "s", 0) for n in range(20) for _ in range(1 + n % 7)]
    mapped = EmbeddingMap("mean_layer6", np.random.default_rng(0).normal(size=(len(sample), 2)), (0.5, 0.25))
    figure = map_figure(mapped, sample, [f"{n}.faa" for n in range(20)])
    assert len(figure.data) == 8
    assert figure.data[0].name == "other files"
    assert sum(len(trace.x) for trace in figure.data) == len(sample)
    assert len({trace.marker.color for trace in figure.data}) == 8


def test_every_other_figure_can_be_drawn():
    pieces = [
        Piece("GPU 0 on a", "0", kind, 10.0 * n, 10.0 * n + 9, "work") for n, kind in enumerate(("load", "compute"))
    ]
    assert {"load", "compute", "GPU 0 on a"} <= set(texts(drawn(timeline_figure(pieces))))
    runs = [RunRecord(group=str(n), residues_per_second=1000.0 * n, peak_memory_bytes=n << 30) for n in (1, 2)]
    assert {"1,000", "2,000", "1", "2"} <= set(texts(drawn(speed_figure(runs))))
    assert {"1.50 GB", "store"} & set(texts(drawn(disk_figure({"store": 1_500_000_000, "plan": 10})))) == {"store"}
    sequence = VerifiedSequence(
        digest="", file="a.faa", record=1, id=HOSTILE, length=10, precision="fp32", segment="", row=0, position=0,
        passed=True, outputs={"mean_layer6": Agreement(1.0, 0.0, 1.0)},
    )  # fmt: skip
    sequences = (sequence, replace(sequence, length=20))
    svg = drawn(certificate_figure(Certificate(passed=True, sequences=sequences, limits={"fp32": LIMITS["fp32"]})))
    assert len(elements(svg, "circle")) == 2
    assert "limit for fp32: cosine 0.99999" in texts(svg)
