"""Data, inference and measuring import each other in one direction only, and what must be cheap to import is."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STDLIB = frozenset(sys.stdlib_module_names)
HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "numpy",
    "scipy",
    "pandas",
    "matplotlib",
    "pyarrow",
}


@dataclass(frozen=True)
class Layer:
    """Files and the packages that they may import besides the standard library and each other."""

    files: tuple[str, ...]
    allowed: frozenset[str]


def layer(files: str, allowed: str) -> Layer:
    return Layer(tuple(files.split()), frozenset(allowed.split()))


# The first layer that names a file counts.
LAYERS = {
    "coeffs": layer("coeffs/**/*.py", "coeffs yaml"),
    "runtime, pure": layer(
        "runtime/decide/*.py runtime/stats.py runtime/errors.py", "coeffs runtime"
    ),
    "runtime, its face": layer("runtime/__init__.py", "coeffs runtime teacal"),
    "runtime, compatibility": layer("runtime/compat/*.py", "torch diffusers"),
    "runtime": layer("runtime/**/*.py", "coeffs runtime torch diffusers"),
    "calibrate, analysis": layer(
        "calibrate/fitting/*.py calibrate/runs/pairs.py calibrate/runs/gram_log.py calibrate/text.py "
        "calibrate/planning/problem.py calibrate/verifying/comparison.py "
        "calibrate/certifying/tiers.py",
        "calibrate coeffs runtime numpy scipy pandas",
    ),
    "calibrate, plots": layer(
        "calibrate/reporting/plots.py calibrate/reporting/style.py",
        "calibrate coeffs matplotlib numpy pandas",
    ),
    "calibrate, recorder": layer(
        "calibrate/recording/recorder.py calibrate/model/table.py",
        "calibrate coeffs runtime torch diffusers yaml",
    ),
    "calibrate, other engines": layer(
        "calibrate/trials/through.py", "calibrate coeffs diffusers yaml cache_dit"
    ),
    "calibrate, command line": layer(
        "calibrate/cli.py calibrate/__init__.py calibrate/__main__.py calibrate/commands/*.py",
        "calibrate coeffs runtime teacal click click_default_group",
    ),
    "calibrate": layer(
        "calibrate/**/*.py",
        "calibrate coeffs runtime torch diffusers transformers numpy scipy pandas pyarrow matplotlib yaml tqdm "
        "PIL jinja2 markupsafe",
    ),
}
# What the pure layers may take from runtime: the files without torch, and the package itself.
PURE = {"runtime.decide", "runtime.stats", "runtime.errors"}
NEEDS_PURE = {"runtime, pure", "calibrate, analysis"}


def imports(source: str, package: str = "") -> Iterator[tuple[str, int]]:
    """Every import, also inside functions, as ``(module, line)``; those for type checkers cost nothing."""

    def walk(node: ast.AST) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                parents = (
                    package.split(".")[: len(package.split(".")) - child.level + 1]
                    if child.level
                    else []
                )
                module = ".".join([*parents, *filter(None, [child.module])])
                yield from ((f"{module}.{alias.name}", child.lineno) for alias in child.names)
            elif isinstance(child, ast.Call) and _name(child.func) in (
                "import_module",
                "__import__",
            ):
                yield from (
                    (a.value, child.lineno)
                    for a in child.args[:1]
                    if isinstance(a, ast.Constant)
                )
            yield from walk(child)

    yield from walk(ast.parse(source))


def _name(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def violations(name: str, source: str, package: str = "") -> list[str]:
    """Imports in ``source`` that layer ``name`` forbids."""
    allowed, found = LAYERS[name].allowed, []
    for module, line in imports(source, package):
        top = module.partition(".")[0]
        if top in STDLIB:
            continue
        if top not in allowed:
            found.append(f"line {line}: {module} (allowed: {', '.join(sorted(allowed))})")
        elif (
            name in NEEDS_PURE
            and top == "runtime"
            and ".".join(module.split(".")[:2]) not in PURE
        ):
            found.append(f"line {line}: {module} is no pure file of runtime")
    return found


def private_diffusers(source: str) -> list[str]:
    """Imports of diffusers' names that start with an underscore, or come from inside ``diffusers.hooks``."""
    return [
        f"line {line}: {module}"
        for module, line in imports(source)
        if module.startswith("diffusers")
        and (
            any(part.startswith("_") for part in module.split("."))
            or module.startswith("diffusers.hooks.hooks")
        )
    ]


def files() -> dict[str, str]:
    """Every file of the packages with the name of its layer."""
    owner: dict[str, str] = {}
    for name, rule in LAYERS.items():
        for pattern in rule.files:
            for path in sorted(ROOT.glob(pattern)):
                owner.setdefault(path.relative_to(ROOT).as_posix(), name)
    return owner


FILES = files()


@pytest.mark.parametrize("path", FILES)
def test_imports_go_one_way(path: str) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    assert not violations(FILES[path], source, Path(path).parent.as_posix().replace("/", "."))


def test_every_file_has_a_layer() -> None:
    present = {
        path.relative_to(ROOT).as_posix()
        for package in ("coeffs", "runtime", "calibrate")
        for path in (ROOT / package).rglob("*.py")
    }
    assert present == set(FILES)
    for rule in LAYERS.values():
        assert all(any(ROOT.glob(pattern)) for pattern in rule.files), (
            f"no such file: {rule.files}"
        )


def test_only_one_file_knows_what_diffusers_does_not_publish() -> None:
    offenders = {
        path: private_diffusers((ROOT / path).read_text(encoding="utf-8"))
        for path in FILES
        if path != "runtime/compat/diffusers_private.py"
    }
    assert not {path: found for path, found in offenders.items() if found}
    assert private_diffusers(
        (ROOT / "runtime/compat/diffusers_private.py").read_text(encoding="utf-8")
    )


def test_only_one_file_knows_what_torch_does_not_publish() -> None:
    for path in set(FILES) - {"runtime/compat/torch_private.py"}:
        for module, line in imports((ROOT / path).read_text(encoding="utf-8")):
            parts = module.split(".")
            assert not (
                parts[0] == "torch" and any(part.startswith("_") for part in parts)
            ), f"{path}:{line} {module}"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("coeffs", "import numpy"),
        ("coeffs", "def f():\n    from runtime.decide.gate import Gate"),
        ("coeffs", "class A:\n    def f(self):\n        import torch.nn as nn"),
        (
            "coeffs",
            "import importlib\nimportlib.import_module('calibrate.fitting.least_squares')",
        ),
        ("runtime, pure", "import torch"),
        ("runtime, pure", "from runtime.watch.hooks import StackHooks"),
        ("runtime", "try:\n    from calibrate import fit\nexcept ImportError:\n    pass"),
        ("runtime", "import numpy as np"),
        ("runtime, compatibility", "import coeffs"),
        ("calibrate, analysis", "from runtime.cache import CacheHandler"),
        ("calibrate, analysis", "import matplotlib.pyplot"),
        ("calibrate, plots", "if True:\n    import torch"),
        ("calibrate, command line", "import torch"),
    ],
)
def test_the_check_itself_can_fail(name: str, source: str) -> None:
    assert violations(name, source)
    assert not violations(name, "import json\nfrom pathlib import Path")


def test_the_private_name_check_can_fail() -> None:
    assert private_diffusers("def f():\n    from diffusers.hooks._common import _ALL")
    assert private_diffusers("from diffusers.hooks.hooks import StateManager")
    assert not private_diffusers(
        "from diffusers.hooks import HookRegistry, ModelHook\nimport diffusers"
    )


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import coeffs", HEAVY | {"runtime", "calibrate"}),
        (
            "import coeffs; coeffs.load('vllm-omni/longcat-image')",
            HEAVY | {"runtime", "calibrate"},
        ),
        ("import runtime; runtime.Gate, runtime.Stats", HEAVY | {"calibrate"}),
        ("import calibrate", HEAVY),
        ("import calibrate.cli", HEAVY),
        (
            "import sys; sys.argv = ['calibrate', '--help']; from calibrate.cli import main; main()",
            HEAVY,
        ),
    ],
)
def test_cheap_imports_stay_cheap(code: str, absent: set[str]) -> None:
    """In a process of its own; ``SystemExit`` is how the command line ends."""
    script = f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit:\n    pass\nprint('\\n', *sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert absent.isdisjoint(done.stdout.splitlines()[-1].split())
