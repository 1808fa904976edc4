"""What the documentation promises is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from esmflow.checkpoint.models import OFFICIAL_MODELS, SIZES
from esmflow.engine.packed import SHARE_OF_FREE_MEMORY, bytes_per_token, wanted_tokens
from esmflow.failures import REMEDY, Reason
from esmflow.report.sections import SECTIONS

PROJECT = Path(__file__).resolve().parents[2]
SCHEMA = yaml.safe_load((PROJECT / "workflow/schemas/config.schema.yaml").read_text())


def keys(properties, prefix=""):
    for key, rule in properties.items():
        yield f"{prefix}{key}", rule
        yield from keys(rule.get("properties", {}), f"{prefix}{key}.")


@pytest.mark.parametrize(("key", "rule"), [k for k in keys(SCHEMA["properties"]) if k[1].get("type") != "object"])
def test_every_key_is_explained_with_its_default(key, rule):
    text = (PROJECT / "config/README.md").read_text()
    described = [line for line in text.splitlines() if f"`{key}`" in line]
    assert described
    default = rule["default"]
    if default is not None:
        shown = str(default).lower() if isinstance(default, bool) else re.sub("'", "", str(default))
        assert any(f"`{shown}`" in line for line in described)


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_is_explained_and_has_a_remedy(reason):
    assert f"`{reason.value}`" in (PROJECT / "docs/outputs.md").read_text()
    assert REMEDY[reason]


@pytest.mark.parametrize("key", [key for key, *_ in SECTIONS])
def test_every_section_of_the_report_has_a_caption_in_plain_words(key):
    caption = (PROJECT / "workflow/report" / f"{key}.rst").read_text()
    assert caption.endswith(".\n")
    # It is shown as it is on the page, and taken as reStructuredText by Snakemake.
    assert not set(caption) & set("`*_{}<>|") - set("_")


def test_files_named_in_the_documentation_exist():
    pages = [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md"), PROJECT / "config/README.md"]
    for document in (str(path.relative_to(PROJECT)) for path in pages):
        text = (PROJECT / document).read_text()
        for linked, named in re.findall(
            r"\]\(([^)#:]+)\)|`((?:config|workflow|tests|resources)/[^`{}* ]+)`",
            re.sub(r"```.*?```", "", text, flags=re.S),
        ):
            path = (PROJECT / document).parent / linked if linked else PROJECT / named
            assert path.exists(), f"{document}: {linked or named}"


def test_the_first_page_is_short():
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("size", SIZES)
def test_the_memory_of_a_card_on_the_first_page_is_what_the_engine_s_rule_gives(size):
    model = OFFICIAL_MODELS[SIZES[size]]
    of_an_h100 = 132 * 128
    weights, token = 2 * model.parameters, bytes_per_token(model, "bf16") / SHARE_OF_FREE_MEMORY
    least, full = (5e8 + weights + tokens * token for tokens in (1024, wanted_tokens(model, of_an_h100)))
    row = next(line for line in (PROJECT / "README.md").read_text().splitlines() if line.startswith(f"| `{size}` |"))
    assert f"| {least / 1e9:.1f} GB, {full / 1e9:.1f} GB |" in row
