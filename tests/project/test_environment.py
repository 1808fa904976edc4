"""pyproject.toml, environment.yml and requirements.lock are one environment, written down three times."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parents[2]
CONDA_NAMES = {"torch": "pytorch", "snakemake": "snakemake-minimal"}
# What is imported under another name than it is installed by.
INSTALLED_AS = {
    "Bio": "biopython",
    "esm": "fair-esm",
    "pynvml": "nvidia-ml-py",
    "sklearn": "scikit-learn",
    "vl_convert": "vl-convert-python",
    "yaml": "pyyaml",
}

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())


def ranges(requirements: list[str]) -> dict[str, SpecifierSet]:
    parsed = [Requirement(requirement) for requirement in requirements]
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in parsed}


RUN = ranges(PYPROJECT["project"]["dependencies"])
DEVELOP = ranges(PYPROJECT["dependency-groups"]["dev"])


@pytest.fixture(scope="module")
def conda() -> dict[str, SpecifierSet]:
    """The ranges of environment.yml under their names in pip."""
    pip_names = {conda: pip for pip, conda in CONDA_NAMES.items()}
    found = {}
    for line in yaml.safe_load((PROJECT / "environment.yml").read_text())["dependencies"]:
        name, _, specifier = line.partition(" ")
        found[pip_names.get(name, name)] = SpecifierSet(specifier)
    return found


@pytest.fixture(scope="module")
def locked() -> list[Requirement]:
    lines = (PROJECT / "requirements.lock").read_text().splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("name", sorted(RUN))
def test_conda_users_get_the_ranges_of_pip_users(conda, name):
    assert conda[name] == RUN[name]


def test_environment_yml_holds_nothing_that_pyproject_does_not(conda):
    known = {**DEVELOP, **RUN, "python": SpecifierSet(PYPROJECT["project"]["requires-python"])}
    assert {name: known.get(name) for name in conda} == conda


def test_conda_users_can_submit_to_slurm_and_get_no_tools_of_the_tests(conda):
    name = "snakemake-executor-plugin-slurm"
    assert conda.keys() - RUN.keys() == {"python", name}
    assert f"'{name}{conda[name]}'" in (PROJECT / "profiles" / "README.md").read_text()


@pytest.mark.parametrize("name", sorted({**DEVELOP, **RUN}))
def test_every_dependency_is_locked_to_a_version_in_its_range(locked, name):
    versions = [requirement.specifier for requirement in locked if canonicalize_name(requirement.name) == name]
    assert versions
    allowed = {**DEVELOP, **RUN}[name]
    for version in versions:
        (pin,) = version
        assert pin.operator == "=="
        assert allowed.contains(pin.version)


def test_everything_in_the_lock_is_pinned_once_for_each_platform(locked):
    for requirement in locked:
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), str(requirement)
    applying = [r.name for r in locked if r.marker is None or r.marker.evaluate()]
    assert len(applying) == len(set(applying))


def test_the_lock_needs_no_private_index_and_no_cuda_packages(locked):
    text = (PROJECT / "requirements.lock").read_text()
    assert "://" not in text
    assert "--index-url" not in text
    assert not [r.name for r in locked if r.name.startswith(("nvidia-c", "nvidia-n", "cuda-"))]


def imported_packages(folder: Path) -> set[str]:
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).partition(".")[0])
    return {INSTALLED_AS.get(name, name) for name in found - set(sys.stdlib_module_names) - {"esmflow"}}


def test_every_package_that_the_library_imports_is_a_dependency():
    imported = {canonicalize_name(name) for name in imported_packages(PROJECT / "workflow" / "scripts")}
    assert {"torch", "numpy", "pyarrow"} <= imported
    # Triton comes with torch's CUDA builds and is asked for only there; the tests have it for its interpreter.
    # FAISS is used where somebody has installed it.
    assert imported - {"triton", "faiss"} <= RUN.keys()
