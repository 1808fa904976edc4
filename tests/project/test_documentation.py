"""What the documentation promises is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from esmflow.checkpoint.families import FAMILIES, Family
from esmflow.checkpoint.models import OFFICIAL_MODELS, SIZES, ModelDimensions
from esmflow.config.configuration import validated
from esmflow.config.job_estimates import GroupWork, estimate_job, job_settings
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


def memory_of_a_card(model: ModelDimensions) -> str:
    """What the engine's rule gives for one protein, and for a batch as large as an H100 gains from."""
    of_an_h100 = 132 * 128
    weights, token = 2 * model.parameters, bytes_per_token(model, "bf16") / SHARE_OF_FREE_MEMORY
    least, full = (5e8 + weights + tokens * token for tokens in (1024, wanted_tokens(model, of_an_h100)))
    return f"{least / 1e9:.1f} GB, {full / 1e9:.1f} GB"


@pytest.mark.parametrize("size", SIZES)
def test_the_memory_of_a_card_on_the_first_page_is_what_the_engine_s_rule_gives(size):
    row = next(line for line in (PROJECT / "README.md").read_text().splitlines() if line.startswith(f"| `{size}` |"))
    assert f"| {memory_of_a_card(OFFICIAL_MODELS[SIZES[size]])} |" in row


def rounded(number: float) -> str:
    """To two digits."""
    return f"{float(f'{number:.2g}'):,g}"


def described(name: str) -> str:
    """A model's row in docs/choosing.md, from the table in the code."""
    model = OFFICIAL_MODELS[name]
    config = validated({"threads": 2}, PROJECT / "workflow" / "schemas" / "config.schema.yaml")
    seconds = estimate_job(GroupWork(3_420_000, 10_000, True), model, job_settings(config, "cuda")).seconds
    default = ", the default" if name == config["model"] else ""
    weights = 2 * model.parameters
    cells = [
        f"`{name}`{default}",
        f"{model.layers}",
        f"{model.hidden:,}",
        f"{rounded(weights / 1e9)} GB" if weights > 1e8 else f"{rounded(weights / 1e6)} MB",
        memory_of_a_card(model),
        f"{4 * model.hidden / 1e3:.1f} kB",
        rounded(2 * model.layers * model.layer_parameters / 1e9),
        f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min",
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", OFFICIAL_MODELS)
def test_every_model_is_in_the_table_with_what_the_code_says_of_it(name):
    assert described(name) in (PROJECT / "docs" / "choosing.md").read_text().splitlines()


def of_family(family: Family) -> str:
    """A family's row in docs/choosing.md."""
    model = next(model for model in OFFICIAL_MODELS.values() if model.family is family)
    cells = [
        family.name,
        family.licence,
        f"{model.longest:,}" if model.longest else "any",
        *("yes" if there else "no" for there in (family.contacts, model.has_lm_head, family.eight_bits)),
        "yes" if family.in_fair_esm else "no",
        family.reference,
        family.citation,
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_in_the_table_with_what_the_code_says_of_it(name):
    assert of_family(FAMILIES[name]) in (PROJECT / "docs" / "choosing.md").read_text().splitlines()


@pytest.mark.parametrize("page", ["config/README.md", "docs/choosing.md"])
def test_every_official_name_is_in_the_pages_that_list_them(page):
    text = (PROJECT / page).read_text()
    assert not [name for name in OFFICIAL_MODELS if f"`{name}`" not in text]
