"""Makes ``calibrate/data/example-run`` anew: a small real run of the embedded model, fitted, planned, verified, thinned out.

    python notebooks/make_example_run.py [FOLDER]

What the notebooks and the report do not show (most samples, timing, tuning) is left away, so that it stays small.
"""

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import coeffs
from calibrate import fit, plan, record, verify
from calibrate.reporting.run_data import example_run
from calibrate.verifying.results import Verification, write_verification

POLICIES = ("gate", "plan", "uniform", "fewer-steps")
BUDGETS = (21, 14, 8)
SHOWN_SAMPLES = 3


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "example-run"
        record("tiny-longcat-image", num_prompts=10, out=folder)
        coeffs.save(fit(folder, command="calibrate fit RUN"), folder / "entry.yaml")
        plan(folder, computed=[14], choosing=4, num_prompts=2)
        verification = verify(folder, num_prompts=8, budgets=BUDGETS, policies=POLICIES)
        thin_out(folder, verification)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {size / 1000:.0f} kB\n{verification.headline}")


def thin_out(folder: Path, verification: Verification) -> None:
    """Keep the pairs, the entry and what a reader of the verification sees."""
    for name in ("timing", "gram", "trajectories", "failures", "corrupt", "inputs", "report"):
        shutil.rmtree(folder / name, ignore_errors=True)
    results = verification.results
    worst = results[results["sample"].notna()].sort_values("psnr_db")
    shown = worst.groupby("policy").head(SHOWN_SAMPLES)
    kept = {*shown["sample"], *shown["reference"], "results.parquet", "verification.json"}
    for path in [*(folder / "verify").rglob("*"), folder / "lock"]:
        if path.is_file() and path.name not in kept:
            path.unlink()
    samples = results["sample"].where(results["sample"].isin(kept), None)
    write_verification(replace(verification, results=results.assign(sample=samples)))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else example_run())
