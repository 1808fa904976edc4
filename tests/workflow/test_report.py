"""The report of a run, opened as a person would open it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html import unescape
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from browser import open_page
from workflow_run import WorkflowRun

from esmflow.report.sections import SECTIONS

# Ids without white space, as FASTA has them, that do something where they are not escaped.
HOSTILE = [
    "<script>document.title='broken'</script>",
    "</script><script>document.title='broken'</script>",
    "<img/src=x/onerror=document.title='broken'>",
    "<!--<b>{{7*191}}&amp;\"'`${7*191}",
]
DRAWN = ("flow", "failures", "lengths", "timeline", "speed", "certificate", "map", "disk")


@pytest.fixture(scope="module")
def run(tmp_path_factory, real_model_folder, short_proteins) -> WorkflowRun:
    run = WorkflowRun(
        tmp_path_factory.mktemp("report"),
        real_model_folder,
        groups=2,
        max_residues=100,
        verify={"sample": 6},
        report=True,
    )
    good, bad = run.folder / "good.faa", run.folder / "hostile&amp;.faa"
    good.write_text("".join(f">{h}\n{s[:150]}\n" for h, s in short_proteins[:12]))
    named = [f">{id} {id}\n{s[:60]}\n" for id, (_, s) in zip(HOSTILE, short_proteins[12:])]
    rejected = [f">{id} {id}\nMKJ{number}\n" for number, id in enumerate(HOSTILE)]
    bad.write_text("".join([*named, *rejected, f">copy\n{short_proteins[0][1][:150]}\n"]))
    run.write_samples({"good": good, "hostile": bad})
    run.printed = run.succeed()
    return run


@pytest.fixture(scope="module")
def opened(run):
    return open_page(run.results / "report.html")


def sections(dom: str) -> dict[str, str]:
    parts = re.split(r'<section id="(\w+)"', dom)[1:]
    return dict(zip(parts[::2], parts[1::2]))


def marks(html: str, width: str = "wide") -> list[str]:
    """What one can point at in a section's figure, the first of several, by what it says."""
    drawing, *_ = re.findall(f'<div class="{width}">(.*?)</svg>', html, flags=re.S) or [""]
    return [unescape(label) for label in re.findall(r'<(?:path|circle|rect) [^>]*aria-label="([^"]*)"', drawing)]


def open_with(page, folder, script: str, *options: str):
    """The page as it is after a script ran in it, which leaves a result in the body's `data-found`."""
    text = page.read_text().replace(
        "</body>", f"<script>document.body.dataset.found = JSON.stringify({script})</script>"
    )
    (folder / "page.html").write_text(text)
    opened = open_page(folder / "page.html", *options)
    assert opened.console == []
    return json.loads(unescape(re.search(r'data-found="([^"]*)"', opened.dom)[1]))


def words(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<script.*?</script>", "", html, flags=re.S))).split())


def test_every_section_has_content_and_the_console_stays_empty(opened):
    assert opened.console == []
    shown = sections(opened.dom)
    assert list(shown) == [key for key, *_ in SECTIONS]
    for key, html in shown.items():
        assert len(words(html)) > 100, key
        assert "could not be shown" not in html
        assert (len(marks(html)) > 0) == (key in DRAWN), key


def test_the_numbers_are_those_of_the_run(run, opened):
    text = words(opened.dom)
    assert "17 of 21 records have an embedding" in text
    assert "4 rejected, 0 failed" in text
    assert "Of 21 records 4 were rejected and 1 are duplicates. Of 16 unique sequences 16 were computed" in text
    assert "invalid_residue: 4 records" in text
    shown = sections(opened.dom)
    for group in run.groups():
        assert f'<td class="number">{group["residues"]:,}</td>' in shown["speed"]
    fingerprint = json.loads((run.results / "plan" / "plan.json").read_text())["fingerprint"]
    assert fingerprint in shown["method"]
    # Only what this run did: it was in fp32.
    assert "auto is" not in shown["method"]
    assert "GELU by erf" in shown["method"]
    assert "bf16" not in shown["method"]
    assert "With collecting and verifying" in shown["method"]
    assert re.search(r"good 12 12 0 0 hostile 9 5 4 0 ", words(shown["flow"]))
    assert run.summary()["versions"]["torch"] in shown["method"]
    assert "CPU-0" in shown["timeline"]
    assert "Passed. 6 sequences computed again with fair-esm" in words(shown["certificate"])
    assert len(marks(shown["certificate"])) == 6
    # One point for each embedded record.
    assert len(marks(shown["map"])) == len(marks(shown["map"], "narrow")) == 17


def test_a_paper_and_another_run_have_what_they_need(run, opened):
    shown = words(sections(opened.dom)["paper"])
    assert f"checkpoint {json.loads((run.results / 'model' / 'model.json').read_text())['name']})" in shown
    assert "For each protein it computed the mean over its residues of layer 6." in shown
    assert "sequences of more than 100 residues were cut off there." in shown
    assert "Of 21 records 17 were embedded and 4 were not (invalid residue: 4)." in shown
    assert "https://doi.org/10.1126/science.ade2574" in shown
    assert "--cores" in shown
    assert "max_residues: 100" in shown


def test_ids_are_shown_as_they_are_and_do_nothing(run, opened):
    assert "<title>esmflow: 17 of 21 records have an embedding</title>" in opened.dom
    rejected = words(sections(opened.dom)["failures"])
    assert all(id in rejected for id in HOSTILE)
    assert "1337" not in words(opened.dom)
    assert "<img" not in opened.dom
    elements = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: elements.append((tag, {name for name, _ in attributes}))
    parser.feed((run.results / "report.html").read_text())
    assert [tag for tag, _ in elements].count("script") == 1
    assert not [tag for tag, names in elements if tag == "img" or names & {"src", "onerror", "onclick"}]
    pointed = marks(sections(opened.dom)["map"])
    assert all(any(label.startswith(f"{id}\n60 residues") for label in pointed) for id in HOSTILE)


def test_the_page_needs_nothing_but_itself(run):
    addresses = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: addresses.extend(
        value for name, value in attributes if name in ("src", "href", "srcset", "action", "style")
    )
    parser.feed((run.results / "report.html").read_text())
    assert len(addresses) > len(SECTIONS)
    for address in addresses:
        assert "//" not in address
        beside = run.results / unquote(address)
        assert address.startswith(("#", "data:", "flex-grow:")) or beside.exists(), address
    results = {"manifest.parquet", "failures.tsv", "certificate.json", "embeddings/mean_layer6/embeddings.h5"}
    assert results <= set(addresses)


def test_a_map_has_its_colours_chosen_one_at_a_time(run, tmp_path):
    script = """(() => {
      const shown = () => [...document.querySelectorAll("#map .view")].filter((view) => view.offsetHeight).length;
      const names = [...document.querySelectorAll("#map label")].map((label) => label.textContent);
      const legend = () => [...document.querySelectorAll("#map .view")].find((view) => view.offsetHeight).textContent;
      const before = [shown(), legend().includes("hostile")];
      document.querySelectorAll("#map label")[2].click();
      return [names, ...before, shown(), legend().includes("residues")];
    })()"""
    found = open_with(run.results / "report.html", tmp_path, script)
    assert found == [["by sample", "by input file", "by length"], 1, True, 1, True]


def test_the_page_is_small(run):
    assert (run.results / "report.html").stat().st_size < 1_000_000


def test_what_is_pointed_at_says_what_it_is(run, tmp_path):
    script = """(() => {
      const bar = document.querySelector("#failures .wide [aria-label]"), place = bar.getBoundingClientRect();
      const at = { bubbles: true, clientX: place.left + 2, clientY: place.top + 2 };
      const say = (to) => (to.dispatchEvent(new PointerEvent("pointermove", at)), document.querySelector(".tip"));
      return [say(bar).textContent, say(bar).className, say(document.body).className];
    })()"""
    assert open_with(run.results / "report.html", tmp_path, script) == [
        "invalid_residue: 4 records", "tip shown", "tip",
    ]  # fmt: skip


def test_dark_mode_reaches_the_figures(run, tmp_path):
    script = """["text", "circle"].map((tag) => getComputedStyle(document.querySelector(`#map .wide ${tag}`)).fill)"""
    found = [
        open_with(run.results / "report.html", tmp_path, script, *options)
        for options in ([], ["--blink-settings=preferredColorScheme=0"])
    ]
    assert found == [["rgb(87, 97, 109)", "rgb(0, 114, 178)"], ["rgb(155, 167, 180)", "rgb(61, 155, 220)"]]


def test_nothing_is_wider_than_a_phone(run, tmp_path):
    shutil.copy(run.results / "report.html", tmp_path / "report.html")
    (tmp_path / "phone.html").write_text(
        '<iframe id="phone" src="report.html" style="width: 360px; border: 0"></iframe><p id="widths"></p>'
        "<script>phone.onload = () => setTimeout(() => { const page = phone.contentDocument;"
        "const rights = (what) => [...page.querySelectorAll(what)].map((svg) => svg.getBoundingClientRect().right);"
        "const shown = rights('.figure text, .figure svg').filter((right) => right > 0);"
        "widths.textContent = JSON.stringify([page.documentElement.scrollWidth, shown.length, Math.max(...shown),"
        "Math.max(...rights('.wide svg'))]); }, 2000)</script>"
    )
    dom = open_page(tmp_path / "phone.html", "--allow-file-access-from-files", "--hide-scrollbars").dom
    width, figures, right, wide = json.loads(re.search(r'<p id="widths">(.*?)</p>', dom)[1])
    assert width <= 360
    assert figures > 10 * len(DRAWN)
    assert right <= 360
    assert wide == 0


def test_snakemakes_own_report_has_the_figures_with_captions(run):
    target = run.folder / "snakemake-report.html"
    run.succeed("--report", str(target))
    page = target.read_text()
    for key in DRAWN:
        picture = run.results / "report" / f"{key}.svg"
        assert base64.b64encode(picture.read_bytes()).decode() in page, key
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert "Records with equal sequences share one" in page


def test_a_figure_that_cannot_be_drawn_loses_nothing_else(run):
    for segment in run.segments():
        segment.write_bytes(b"damaged")
    before = (run.results / "manifest.parquet").read_bytes()
    run.succeed("--forcerun", "report")
    shown = sections((run.results / "report.html").read_text())
    assert "could not be shown" in words(shown["map"])
    assert all("could not be shown" not in html for key, html in shown.items() if key != "map")
    assert (run.results / "manifest.parquet").read_bytes() == before
    assert "SegmentError" in (run.folder / "logs" / "report.log").read_text()
