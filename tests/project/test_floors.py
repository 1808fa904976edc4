"""The floors of the library: imports run down only, so that a room can be read without those above it."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from workflow_run import PROJECT

LIBRARY = PROJECT / "workflow" / "scripts" / "esmflow"
MOST_FILES = 12

GROUND = ("errors", "failures", "files", "logs", "text", "threads")
WORDS = ("arrays", "method")
EVERYWHERE = (*GROUND, *WORDS)
# What each room may import besides its own modules; `room.module` allows no other module of that room.
MAY_IMPORT = {
    **dict.fromkeys(GROUND, GROUND),
    "arrays": GROUND,
    "method": (*GROUND, "arrays"),
    "inputs": GROUND,
    "checkpoint": (*GROUND, "arrays"),
    "slots": GROUND,
    "workers": GROUND,
    "store": (*EVERYWHERE, "inputs.residues"),
    "step": (*EVERYWHERE, "checkpoint.file", "checkpoint.models", "workers.lifetime"),
    "variants": (*EVERYWHERE, "inputs"),
    "plan": (*EVERYWHERE, "inputs", "store", "checkpoint", "workers.lifetime", "variants"),
    "engine": (*EVERYWHERE, "checkpoint", "inputs.residues", "store.segments"),
    "embedding": (*EVERYWHERE, "plan.shards", "plan.run_plan", "store", "checkpoint", "slots", "workers", "engine"),
    "collect": (*EVERYWHERE, "store", "plan", "inputs", "variants", "embedding.run_record"),
    "verify": (
        *EVERYWHERE,
        "store",
        "plan",
        "inputs",
        "checkpoint",
        "slots",
        "workers",
        "engine.fair_esm",
        "engine.memory",
    ),
    "report": (
        *(
            *EVERYWHERE,
            "store",
            "checkpoint.file",
            "checkpoint.families",
            "plan",
            "collect",
            "verify",
            "embedding.run_record",
            "embedding.status",
        ),
        *("slots.gpus", "step"),
    ),
    # What `import esmflow` gives is loaded when it is asked for, and so is what the command needs.
    "__init__": ("python",),
    "python": (*EVERYWHERE, "inputs", "checkpoint", "engine", "collect", "config"),
    "cli": (
        *(*EVERYWHERE, "inputs", "checkpoint.file", "slots", "workers.lifetime", "embedding", "collect", "config"),
        *("verify.certificate", "report.summary"),
    ),
    "config": (
        *EVERYWHERE,
        "inputs",
        "checkpoint",
        "store",
        "plan",
        "collect",
        "slots",
        "embedding",
        "verify",
        "variants",
    ),
}
# Rooms whose use costs seconds or must wait for CUDA_VISIBLE_DEVICES: imported inside functions only, or for types.
INSIDE_FUNCTIONS = {("embedding", "engine"), ("verify", "engine"), ("python", "engine"), ("__init__", "python")}
TORCH_INSIDE_FUNCTIONS = ("checkpoint", "collect", "embedding", "python", "slots", "verify")
TORCH_AT_THE_TOP = ("engine", "collect/writers", "verify/recompute.py", "verify/esm_c.py")


@dataclass(frozen=True)
class Import:
    """One import of one module of the library, or of another package."""

    file: str
    module: str
    inside: bool
    """In a function, or under TYPE_CHECKING."""


@cache
def imports() -> list[Import]:
    found = []
    for path in sorted(LIBRARY.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        at_the_top = {id(node) for node in tree.body}
        file = path.relative_to(LIBRARY).as_posix()
        for node in ast.walk(tree):
            inside = id(node) not in at_the_top
            if isinstance(node, ast.Import):
                found += [Import(file, alias.name, inside) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{file}: a relative import"
                # `from esmflow.engine import kernels` names a module, `from esmflow.files import read_json` does not.
                parts = [f"{node.module}.{alias.name}" for alias in node.names]
                found += [Import(file, part if is_module(part) else node.module, inside) for part in parts]
    return found


def is_module(name: str) -> bool:
    path = LIBRARY.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def own(name: str) -> str:
    """`esmflow.store.segments` as `store.segments`; nothing for other packages."""
    return name.removeprefix("esmflow.") if name.startswith("esmflow.") else ""


def test_every_room_imports_only_what_lies_below_it():
    wrong = []
    for found in imports():
        room, target = found.file.split("/")[0].removesuffix(".py"), own(found.module)
        if not target or target.split(".")[0] == room:
            continue
        if target.split(".")[0] not in MAY_IMPORT[room] and target not in MAY_IMPORT[room]:
            wrong.append(f"{found.file} imports {target}")
    assert not wrong


def test_every_room_is_on_the_plan():
    rooms = {path.stem for path in LIBRARY.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms == MAY_IMPORT.keys()


def test_no_modules_import_one_another_in_a_circle():
    graph: dict[str, set[str]] = {}
    for found in imports():
        module = found.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        graph.setdefault(module, set())
        if target := own(found.module):
            graph[module].add(target)

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " imports ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    done: set[str] = set()
    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize(("room", "target"), sorted(INSIDE_FUNCTIONS))
def test_what_must_not_be_loaded_early_is_imported_inside_functions(room, target):
    early = [
        found.file
        for found in imports()
        if found.file.startswith((f"{room}/", f"{room}.py"))
        and own(found.module).split(".")[0] == target
        and not found.inside
    ]
    assert not [file for file in early if not file.startswith(TORCH_AT_THE_TOP)]


def test_torch_is_imported_by_the_engine_and_otherwise_inside_functions():
    wrong = []
    for found in imports():
        if found.module.split(".")[0] not in ("torch", "esm", "triton"):
            continue
        allowed = found.file.startswith(TORCH_AT_THE_TOP)
        if not allowed and not (found.inside and found.file.startswith(TORCH_INSIDE_FUNCTIONS)):
            wrong.append(f"{found.file} imports {found.module}")
    assert not wrong


def test_the_library_knows_nothing_of_snakemake():
    assert not [found for found in imports() if found.module.split(".")[0] == "snakemake"]


def test_no_folder_holds_more_files_than_a_reader_takes_in():
    for folder in [LIBRARY, *(path for path in LIBRARY.rglob("*") if path.is_dir() and path.name != "__pycache__")]:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder


def test_every_room_says_what_it_is_for():
    for package in LIBRARY.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(Path(package).read_text(encoding="utf-8"))), package
