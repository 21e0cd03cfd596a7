"""What is timed through the public functions on a whole pipeline: the measures, and a verification's cost a prompt."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import synchronize
from benchmarks.workloads import Workload
from calibrate.errors import CalibrateError

VERIFIED_BUDGETS = (25, 12)
POLICIES = ("gate", "uniform", "fewer-steps")


def measure_measures(workload: Workload, rounds: int) -> dict[str, Any]:
    """Milliseconds to compare two images of 1024 x 1024 pixels (at toy size 64 x 64)."""
    from calibrate.trials.lpips import Lpips
    from calibrate.trials.measures import psnr, ssim

    side = 64 if workload.title.endswith("toy size") else 1024
    rng = np.random.default_rng(0)
    image = rng.random((side, side, 3), np.float32)
    other = np.clip(image + 0.01 * rng.standard_normal(image.shape, np.float32), 0, 1)
    measures: dict[str, Callable[[], Any]] = {
        "PSNR": lambda: psnr(other, image),
        "SSIM": lambda: ssim(other, image),
    }
    try:
        for device in dict.fromkeys(["cpu", workload.device]):
            lpips = Lpips(device)
            measures[f"LPIPS on {device}"] = lambda lpips=lpips: lpips(other, image)
    except CalibrateError as error:
        return {"milliseconds": _times(measures, rounds), "without": str(error)}
    return {"milliseconds": _times(measures, rounds)}


def _times(measures: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    found = {}
    for name, run in measures.items():
        run()
        seconds = [_seconds(run) for _ in range(rounds)]
        found[name] = 1000 * statistics.median(seconds)
    return found


def measure_verify(workload: Workload, rounds: int) -> dict[str, Any]:
    """Seconds a prompt of recording and of verifying the embedded model, 50 steps, two budgets, three policies."""
    import coeffs
    from calibrate import fit, record, verify

    toy = workload.title.endswith("toy size")
    steps = 6 if toy else 50
    budgets = (3,) if toy else VERIFIED_BUDGETS
    recorded, judged = (3, 1) if toy else (5, 3)
    common = {
        "dtype": str(workload.dtype).removeprefix("torch."),
        "device": workload.device,
    }
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        recording = _seconds(
            lambda: record(
                num_prompts=recorded,
                steps=steps,
                gram=True,
                out=run,
                progress=False,
                **common,
            )
        )
        coeffs.save(fit(run), run / "entry.yaml")
        verifying = _seconds(
            lambda: verify(
                run,
                num_prompts=judged,
                budgets=budgets,
                policies=POLICIES,
                device=workload.device,
                progress=False,
            )
        )
    return {
        "steps": steps,
        "budgets": list(budgets),
        "policies": list(POLICIES),
        "record_seconds_a_prompt": recording / recorded,
        "verify_seconds_a_prompt": verifying / judged,
    }


def _seconds(run: Callable[[], Any]) -> float:
    synchronize()
    begun = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - begun
