"""Makes ``calibrate/data/example-run`` anew: a small real run of the embedded model, fitted, verified and thinned out.

    python notebooks/make_example_run.py

What the notebooks and the report do not show (most samples, timing, tuning) is left away, so that it stays small.
"""

import shutil
import tempfile
from pathlib import Path

import coeffs
from calibrate.fitting.draft import draft_entry
from calibrate.reporting.run_data import example_run
from calibrate.runs.pairs import load_run
from calibrate.recording.record import record
from calibrate.verifying.verify import verify

POLICIES = ("gate", "apart", "uniform", "fewer-steps", "magcache", "first-block-cache", "sea-cache")
SHOWN_SAMPLES = 3


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "example-run"
        record("tiny-longcat-image", num_prompts=10, out=folder)
        coeffs.save(
            draft_entry(load_run(folder), command="calibrate fit RUN"), folder / "entry.yaml"
        )
        found = verify(folder, num_prompts=6, budgets=[21, 14, 8], policies=POLICIES)
        thin_out(folder, found.results)
        target = example_run()
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    raise SystemExit(f"{target}: {size / 1000:.0f} kB\n{found.headline}")


def thin_out(folder: Path, results) -> None:
    """Keep the pairs, the entry and what a reader of the verification sees."""
    for name in ("timing", "gram", "failures", "corrupt", "inputs", "report"):
        shutil.rmtree(folder / name, ignore_errors=True)
    budgets = sorted(results["budget"].unique())
    shown = results[
        results["sample"].notna() & (results["budget"] == budgets[len(budgets) // 2])
    ].head(SHOWN_SAMPLES)
    keep = {*shown["sample"], *shown["reference"]}
    for path in [*(folder / "verify").rglob("*"), folder / "lock"]:
        if path.is_file() and path.name not in keep | {"results.parquet", "verification.json"}:
            path.unlink()


if __name__ == "__main__":
    main()
