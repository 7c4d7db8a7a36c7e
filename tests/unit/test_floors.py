"""Imports go down, heavy packages stay on their floors, and files stay readable."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.blocked_imports import run_without

REPOSITORY = Path(__file__).parents[2]
NAME = "megatron_mergemix"

FLOORS = (
    ("errors", "template"),
    ("mixtures", "files", "processes", "trials", "console"),
    ("config", "run_dir"),
    ("data",),
    ("checkpoint",),
    ("merge",),
    ("model_facts",),
    ("training_runs",),
    ("evaluate",),
    ("megatron",),
    ("search",),
    ("experiment",),
    ("diagnosis", "validation", "synthetic"),
    ("jobs",),
    ("megatron_lm",),
    ("launch", "offline", "plan"),
    ("report",),
    ("cli",),
    ("__main__",),
)
"""From the ground up. A room imports from the floors below it, and nothing of its neighbours."""

TORCH_FREE = (
    "cli",
    "config",
    "data.blend",
    "data.indexed",
    "data.prepare",
    "data.tokenizers",
    "checkpoint.checks",
    "checkpoint.fingerprint",
    "checkpoint.legacy",
    "checkpoint.legacy_file",
    "checkpoint.metadata",
    "checkpoint.opening",
    "checkpoint.saves",
    "diagnosis.record",
    "evaluate.digests",
    "evaluate.lm_eval_tasks",
    "evaluate.utility",
    "evaluate.windows",
    "experiment.checks",
    "experiment.named_files",
    "experiment.named_models",
    "experiment.search_record",
    "launch.diagnosis",
    "launch.evaluation",
    "launch.verbs",
    "launch.status",
    "launch.submit",
    "merge.placement",
    "mixtures.simplex",
    "model_facts",
    "offline.average",
    "offline.inspect",
    "offline.merge",
    "plan.make",
    "plan.tables",
    "report.compare",
    "report.write",
    "run_dir",
    "search.journal",
    "search.loop",
    "search.mergemix",
    "search.rounds",
    "search.surrogates.choose",
    "training_runs.experiment_runs",
    "trials",
    "validation.fidelity",
    "validation.references",
)
"""What works, or at least starts, where torch is not installed."""

MEGATRON_ROOMS = ("megatron", "megatron_lm")
MEGATRON_ELSEWHERE = {"data.prepare"}
"""Datasets are written by Megatron's own builder, imported when it is needed."""

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}


class Import(NamedTuple):
    """One imported module, and where the statement stands."""

    target: str
    line: int
    on_load: bool


@cache
def modules() -> dict[str, Path]:
    """Return every module below the package, ``data.blend``, and its file."""
    root = REPOSITORY / NAME
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


@cache
def imports_of(path: Path) -> list[Import]:
    """Return what a file imports, but for ``if TYPE_CHECKING``."""
    return list(_imports(ast.parse(path.read_text()), on_load=True))


def _imports(node: ast.AST, on_load: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, on_load) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            assert child.module is not None
            yield Import(child.module, child.lineno, on_load)
            for alias in child.names:  # a name may be a module
                yield Import(f"{child.module}.{alias.name}", child.lineno, on_load)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        else:
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, on_load and not function)


def floor_of(module: str) -> int:
    room = module.split(".")[0]
    (floor,) = (number for number, rooms in enumerate(FLOORS) if room in rooms)
    return floor


def own(target: str) -> str | None:
    """Return ``data.blend`` for ``megatron_mergemix.data.blend``, None for other packages."""
    known = modules()
    name = target.removeprefix(NAME + ".")
    return name if target.startswith(NAME + ".") and name in known else None


def test_every_module_has_a_floor() -> None:
    rooms = [room for floor in FLOORS for room in floor]
    assert {module.split(".")[0] for module in modules()} <= set(rooms)
    assert len(rooms) == len(set(rooms))


def test_imports_go_down() -> None:
    not_down = [
        f"{module}:{line} imports {target}"
        for module, path in modules().items()
        for target, line, _ in imports_of(path)
        if (used := own(target))
        and used.split(".")[0] != module.split(".")[0]
        and floor_of(used) >= floor_of(module)
    ]
    assert not_down == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {
        module: {used for each in imports_of(path) if (used := own(each.target))} - {module}
        for module, path in modules().items()
    }
    while leaves := {module for module, used in graph.items() if not used & graph.keys()}:
        graph = {module: used for module, used in graph.items() if module not in leaves}
    assert sorted(graph) == []


def test_megatron_is_imported_in_its_rooms_only() -> None:
    outside = [
        f"{module}:{line} imports {target}"
        for module, path in modules().items()
        for target, line, on_load in imports_of(path)
        if target.split(".")[0] == "megatron"
        and module.split(".")[0] not in MEGATRON_ROOMS
        and (on_load or module not in MEGATRON_ELSEWHERE)
    ]
    assert outside == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_torch_is_not_imported_by(module: str) -> None:
    """Follows imports on loading through our own modules and their packages."""
    known = modules()
    queue, seen = [module], {module}
    while queue:
        current = queue.pop()
        parents = [current.rsplit(".", depth)[0] for depth in range(1, current.count(".") + 1)]
        targets = [each.target for each in imports_of(known[current]) if each.on_load]
        heavy = [each for each in targets if each.split(".")[0] in ("torch", "megatron")]
        assert not heavy, f"{module} reaches {current}, which imports {heavy}"
        for used in {*parents, *filter(None, map(own, targets))} - seen:
            queue.append(used)
            seen.add(used)


def test_torch_free_modules_load_without_torch() -> None:
    """Other packages might bring torch along; this is the proof that they do not."""
    code = "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = run_without(["torch", "megatron"], code, *(f"{NAME}.{name}" for name in TORCH_FREE))
    assert (done.returncode, done.stderr) == (0, "")


def test_files_are_short() -> None:
    found = {
        str(path.relative_to(REPOSITORY / NAME)): path.read_text().count("\n")
        for path in modules().values()
    }
    long = {
        name: lines for name, lines in found.items() if lines > LONG_FILES.get(name, MAX_FILE_LINES)
    }
    assert long == {}
    assert LONG_FILES.keys() <= found.keys()


def test_functions_fit_a_screen() -> None:
    found = {}
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                name = f"{path.relative_to(REPOSITORY / NAME)}:{node.name}"
                found[name] = node.end_lineno - node.lineno + 1
    long = {
        name: lines
        for name, lines in found.items()
        if lines > LONG_FUNCTIONS.get(name, MAX_FUNCTION_LINES)
    }
    assert long == {}
    assert LONG_FUNCTIONS.keys() <= found.keys()
