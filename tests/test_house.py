"""The house rules that a newcomer relies on: where imports may point, and how large a file or function may grow."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("coeffs", "runtime", "calibrate")
# From the foundation up. A module may import modules of its own floor's folder and of lower floors.
FLOORS = (
    ("coeffs.errors",),
    ("coeffs.entry",),
    ("coeffs",),
    ("coeffs.engines",),
    ("runtime.errors",),
    ("runtime.decide",),
    ("runtime.compat",),
    ("runtime.watch",),
    ("runtime",),
    ("calibrate.errors", "calibrate.text"),
    ("calibrate.model",),
    ("calibrate.runs",),
    ("calibrate.fitting", "calibrate.recording"),
    ("calibrate.trials",),
    ("calibrate.planning",),
    ("calibrate.verifying",),
    ("calibrate.certifying",),
    ("calibrate.reporting",),
    ("calibrate.commands",),
    ("calibrate",),
)
MOST_FILES = 9  # a folder that is read in one glance
MOST_LINES = 300  # a file that is read in one sitting
MOST_FUNCTION_LINES = 60  # a function body that fits a screen
CROWDED = {"coeffs/engines"}  # one writer a file, as many as there are engines


def module_name(path: Path) -> str:
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


def sources() -> dict[str, Path]:
    """Every product module by its dotted name; data folders hold none."""
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {module_name(path): path for path in paths}


SOURCES = sources()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def imported(tree: ast.AST) -> Iterator[str]:
    """Product modules that a tree imports anywhere, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in SOURCES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in SOURCES:
                    yield submodule
                elif node.module in SOURCES:
                    yield node.module


def floor(name: str) -> tuple[int, str]:
    """Height of a module's floor, and the part of it that the module belongs to: the longest name that fits."""
    fitting = [
        (len(part), height, part)
        for height, parts in enumerate(FLOORS)
        for part in parts
        if name == part or name.startswith(f"{part}.")
    ]
    _, height, part = max(fitting)
    return height, part


def is_facade(name: str) -> bool:
    """Whether the module is a package's front: it names what lies above it, imported on first use."""
    return SOURCES[name].name == "__init__.py"


def imports_back_up(graph: dict[str, set[str]]) -> list[str]:
    offenders = []
    for name, targets in graph.items():
        height, part = floor(name)
        for target in targets:
            target_height, target_part = floor(target)
            if target_height > height or (target_height == height and target_part != part):
                offenders.append(f"{name} imports {target}")
    return offenders


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of imports, as the modules along it; empty where there is none."""
    finished: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return []
        for target in sorted(graph.get(name, ())):
            around = search(target, [*path, name])
            if around:
                return around
        finished.add(name)
        return []

    return next(filter(None, (search(name, []) for name in sorted(graph))), [])


GRAPH = {
    name: {target for target in imported(tree) if target != name and not is_facade(target)}
    for name, tree in TREES.items()
    if not is_facade(name)
}


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body without its docstring."""
    body = function.body
    first = body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        body = body[1:]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_no_import_points_back_up() -> None:
    assert not imports_back_up(GRAPH)


def test_no_circle_of_imports() -> None:
    assert not circle(GRAPH)


def test_the_import_checks_can_fail() -> None:
    assert imports_back_up({"coeffs.store": {"runtime.apply"}})
    assert imports_back_up({"calibrate.fitting.replay": {"calibrate.recording.record"}})
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not circle({"a": {"b", "c"}, "b": {"c"}})


def test_folders_are_not_crowded() -> None:
    folders = Counter(
        path.parent.relative_to(ROOT).as_posix()
        for path in SOURCES.values()
        if path.name != "__init__.py"
    )
    assert not {
        folder: count
        for folder, count in folders.items()
        if count > MOST_FILES and folder not in CROWDED
    }


@pytest.mark.parametrize("name", SOURCES)
def test_files_and_functions_stay_short(name: str) -> None:
    lines = len(SOURCES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert body_lines(node) <= MOST_FUNCTION_LINES, node.name


def test_apply_tea_cache_reads_in_one_glance() -> None:
    functions = [
        node
        for node in ast.walk(TREES["runtime.apply"])
        if isinstance(node, ast.FunctionDef) and node.name == "apply_tea_cache"
    ]
    assert body_lines(functions[0]) <= 30


def test_tests_mirror_the_folders() -> None:
    """Every folder of product code has a folder of tests of the same name."""
    folders = {
        path.parent.relative_to(ROOT)
        for path in SOURCES.values()
        if "embedded" not in path.parts
    }
    deep = {
        folder
        for folder in folders
        if len(folder.parts) == 2 and folder.parts[0] == "calibrate"
    }
    assert not [
        folder for folder in deep if not list((ROOT / "tests" / folder).glob("test_*.py"))
    ]
