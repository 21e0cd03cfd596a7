"""The programs ``calibrate`` and ``teacal`` start here, beside the three packages.

The packages have everyday names. A module of the user's own called ``runtime`` would be imported in
the place of ours and fail far from the cause, so that is looked for first.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

HOME = Path(__file__).resolve().parent
PACKAGES = ("coeffs", "runtime", "calibrate")

# Packages of the extra `all`, by the name under which they are imported.
EXTRA = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "matplotlib",
    "tqdm",
    "jinja2",
    "PIL",
)


def in_the_way(*names: str) -> str | None:
    """What to do about a module of another origin that has a package's name, or None."""
    for name in names:
        spec = find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None:
            return f"teacal's package {name} is missing: install teacal again"
        if origin.parent.parent != HOME:
            advice = "rename it, or run from another folder"
            return f"{origin} is in the way of teacal's own package {name}: {advice}"
    return None


def check_packages(*names: str) -> None:
    """Raise ``ImportError`` where a package would be imported from elsewhere."""
    problem = in_the_way(*names)
    if problem:
        raise ImportError(problem)


def missing_package(error: ImportError) -> str | None:
    """What to install where a package of the extra `all` is missing; None for other errors."""
    name = (error.name or "").partition(".")[0]
    if name not in EXTRA:
        return None
    return f"{name} is not installed, which this needs: pip install 'teacal[all]'"


def end_if_in_the_way(*names: str) -> None:
    """End the program with one line and exit code 2 where a package would come from elsewhere."""
    problem = in_the_way(*names)
    if problem:
        sys.stderr.write(f"Error: {problem}\n")
        sys.exit(2)


def main() -> None:
    """Entry point of the programs."""
    end_if_in_the_way("calibrate")
    from calibrate.__main__ import main as run

    run()


if __name__ == "__main__":
    main()
