"""Uncached references, real runs under every setting, and what is kept of them.

Everything in the folder is resumable: a result is one line, named by the hash of all that it depends on, so that a new
fit makes only the gate's results anew.
"""

from __future__ import annotations

import json
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from calibrate.errors import InvalidOption
from calibrate.model.prompts import Prompt, PromptSet
from calibrate.model.protocol import canonical_sha256
from calibrate.runs.folder import write_atomically
from calibrate.runs.pairs import Run, load_run
from calibrate.trials.baselines import disagreement
from calibrate.trials.case import Case
from calibrate.trials.lpips import Lpips
from calibrate.trials.measures import HIGHEST_DB, MEASURES, compare_all, main_measure
from calibrate.trials.sampler import (
    Reference,
    Sample,
    Sampler,
    computed_steps,
    load_reference,
    write_reference,
)
from calibrate.trials.setting import SHOWN, Entered, Refused, Setting, replayed_patterns

TUNING_PROMPTS = 2
MEASURING_THREADS = 4  # SSIM of a 1024-pixel image takes 5 s of one core, a cached run often less
# Part of every key: figures of older versions are not mixed with these.
FORMAT = "capped at the floor"


class Bench:
    """Generates, measures and keeps: references, counts for tuning, results."""

    def __init__(
        self, case: Case, prompts: PromptSet, perceptual: Lpips | None, progress: bool
    ) -> None:
        self.case, self.prompts = case, prompts
        self._perceptual, self._progress = perceptual, progress
        self._sampler = Sampler(
            case.session, {**case.recorded_images, **prompts.images}, self._count
        )
        self._bar: Any = None
        self._folder = case.folder / "verify"
        arguments = {name: str(value) for name, value in case.session.arguments.items()}
        self._identity = canonical_sha256([case.identity, arguments, FORMAT])
        self._counts_file = self._folder / "tuning.json"
        self._lines_file = self._folder / "results.jsonl"
        self._counts = (
            json.loads(self._counts_file.read_text()) if self._counts_file.exists() else {}
        )
        self._seconds: dict[str, float] = {}  # of an uncached run, timed by this process
        self._loaded: dict[str, Reference] = {}

    # --- progress

    def expect(self, runs: int) -> None:
        """One bar for so many generations, until results are all there; more are added as tuning asks for them."""
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=runs, desc="running", unit="run", disable=not self._progress, smoothing=0.1
            )
        self._bar.total = self._bar.n + runs
        self._bar.refresh()

    def close(self) -> None:
        """End the bar's line, so that what is printed next has one of its own."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _count(self) -> None:
        if self._bar is not None:
            self._bar.total = max(self._bar.total, self._bar.n + 1)
            self._bar.update()

    # --- references

    def reference(self, prompt: Prompt) -> Reference:
        """The uncached result of a prompt, from the folder or made now."""
        name = self._name(prompt)
        if name not in self._loaded:
            stem = self._folder / "reference" / name
            if not self._has_reference(prompt):
                self._make_reference(prompt, stem)
            self._loaded = {name: load_reference(stem)}  # one at a time: videos are large
        return self._loaded[name]

    def _has_reference(self, prompt: Prompt) -> bool:
        return (self._folder / "reference" / f"{self._name(prompt)}.json").exists()

    def signals(self) -> Run:
        """The recorded pairs of all held-out prompts, for an entry that comes without a run."""
        tables = [self.reference(prompt).pairs for prompt in self.prompts.prompts]
        return load_run(pd.concat(tables, ignore_index=True))

    def floor(self) -> dict[str, Any]:
        """The noise floor in dB, mean over the prompts and the lowest; identical where noise changes nothing."""
        floors = pd.DataFrame([self.reference(prompt).floor for prompt in self.prompts.prompts])
        name = main_measure(floors)
        identical = bool((floors[name] >= HIGHEST_DB).all())
        return {
            "identical": identical,
            name: float(floors[name].mean()),
            f"worst_{name}": float(floors[name].min()),
        }

    def _name(self, prompt: Prompt) -> str:
        return f"{prompt.prompt_id}-{prompt.seed}-{self._identity[:12]}"

    def _make_reference(self, prompt: Prompt, stem: Path) -> None:
        import torch

        from calibrate.recording.recorder import Recorder

        session = self.case.session
        watched = Recorder(session.modules, session.driver, blocks=session.blocks)
        with torch.inference_mode(), watched as recorder:
            recorder.start()
            first = self._sampler(prompt)
            rows = recorder.finish().rows
        if not first.is_finite:
            raise InvalidOption(
                f"prompt {prompt.prompt!r}: the uncached model itself makes NaN or infinity; "
                "try --dtype bfloat16 or float32"
            )
        # Timed without the recorder, and after it, so that it is warm.
        second = self._sampler(prompt, perturbed=True)
        self._seconds[stem.name] = second.seconds
        table = pd.DataFrame(rows).assign(prompt_id=prompt.prompt_id, seed=prompt.seed)
        floor = compare_all(second, first, self._perceptual)
        write_reference(stem, Reference(first.media, first.latents, table, floor))

    def _uncached_seconds(self, prompt: Prompt) -> float:
        """Wall time of an uncached run, timed anew by every process: machines are not always as busy."""
        name = self._name(prompt)
        if name not in self._seconds:
            self._seconds[name] = self._sampler(prompt).seconds
        return self._seconds[name]

    # --- tuning

    def tuning_count(self, setting: Setting) -> float:
        """Mean computed steps of real runs of the tuning prompts under a setting."""
        prompts = (self.case.recorded_prompts or self.prompts.prompts)[:TUNING_PROMPTS]
        key = self._key(replace(setting, policy="", budget=0), *prompts)
        if key not in self._counts:
            samples = [self._sampler.run(setting, prompt) for prompt in prompts]
            self._counts[key] = float(np.mean([sample.computed_steps for sample in samples]))
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._counts_file, json.dumps(self._counts).encode())
        return self._counts[key]

    # --- results

    def results(self, entered: Entered) -> tuple[pd.DataFrame, dict[str, str]]:
        """One row per setting and prompt, and the policies refused on the way; what is there is not run again."""
        done, refused = self._read_lines(), dict(entered.refused)
        half = self.case.num_steps / 2
        budgets = {setting.budget for setting in entered.settings}
        shown = min(budgets, key=lambda budget: abs(budget - half), default=0)
        prompts = self.prompts.prompts
        jobs = [(prompt, setting) for prompt in prompts for setting in entered.settings]
        keys = [self._key(setting, prompt) for prompt, setting in jobs]
        references = [prompt for prompt in prompts if not self._has_reference(prompt)]
        self.expect(sum(key not in done for key in keys) + 2 * len(references))
        waiting: deque[tuple[str, Future[dict[str, Any]]]] = deque()

        def keep_measured(most: int) -> None:
            """Write finished results; wait for the oldest while more than ``most`` are being measured."""
            while waiting and (len(waiting) > most or waiting[0][1].done()):
                key, measured = waiting.popleft()
                done[key] = measured.result()
                self._append(key, done[key])

        with ThreadPoolExecutor(MEASURING_THREADS) as pool:
            for key, (prompt, setting) in zip(keys, jobs, strict=True):
                if setting.policy in refused or key in done:
                    continue
                try:
                    row, sample = self._run(setting, prompt, keep=setting.budget == shown)
                except Refused as error:
                    refused[setting.policy] = str(error)
                    continue
                reference = self.reference(prompt)
                waiting.append((key, pool.submit(self._measured, row, sample, reference)))
                keep_measured(self._most_waiting)
            keep_measured(0)
        self.close()
        frame = pd.DataFrame([done[key] for key in keys if key in done])
        return frame[~frame["policy"].isin(refused)] if len(frame) else frame, refused

    @property
    def _most_waiting(self) -> int:
        """Samples that may wait to be measured. None on the CPU, where measuring would slow the timed runs down."""
        on_gpu = str(self.case.identity["device"]) != "cpu"
        return 2 * MEASURING_THREADS if on_gpu else 0

    def _measured(
        self, row: dict[str, Any], sample: Sample, reference: Reference
    ) -> dict[str, Any]:
        return {**row, **self._measure(sample, reference)}

    def _run(self, setting: Setting, prompt: Prompt, keep: bool) -> tuple[dict[str, Any], Sample]:
        reference = self.reference(prompt)
        uncached_seconds = self._uncached_seconds(prompt)
        sample = self._sampler.run(setting, prompt)
        row = {
            "policy": setting.policy,
            "budget": setting.budget,
            "prompt_id": prompt.prompt_id,
            "seed": prompt.seed,
            "prompt": prompt.prompt,
            "threshold": setting.threshold,
            "computed_steps": sample.computed_steps,
            "num_steps": self.case.num_steps,
            "seconds": sample.seconds,
            "uncached_seconds": uncached_seconds,
            "patterns": sample.patterns,
            "replayed": None,
        }
        if setting.kind == "gate":
            replayed = replayed_patterns(setting, reference.pairs)
            wrong = [disagreement(replayed[name], real) for name, real in sample.patterns.items()]
            row["replayed"] = replayed
            row["replayed_steps"] = computed_steps(replayed)
            row["disagreement"] = float(np.mean(wrong))
        if keep and setting.policy in SHOWN and sample.is_drawable:
            row["sample"] = self._keep_picture(self._key(setting, prompt)[:16], sample)
            row["reference"] = f"{self._name(prompt)}.npz"
        return row, sample

    def _keep_picture(self, name: str, sample: Sample) -> str:
        """The image, the middle frame of a video, or the series, as a file for the report."""
        picture = sample.media[0]
        if picture.ndim == 4:
            picture = picture[len(picture) // 2]
        folder = self._folder / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        dtype = np.float32 if picture.ndim == 2 else np.float16  # pixels lie in [0, 1]
        np.savez_compressed(folder / f"{name}.npz", image=picture.astype(dtype))
        return f"{name}.npz"

    def _measure(self, sample: Sample, reference: Reference) -> dict[str, Any]:
        """All measures of a sample against its reference, dB capped at the noise floor."""
        if not sample.is_finite:
            return {"identical": False, "broken": True, "at_floor": False}
        figures = compare_all(sample, reference, self._perceptual)
        in_db = [name for name in figures if MEASURES[name].unit == "dB"]
        at_floor = all(figures[name] >= reference.floor[name] for name in in_db)
        figures |= {name: min(figures[name], reference.floor[name]) for name in in_db}
        pairs = zip(sample.media, reference.media, strict=True)
        identical = all(np.array_equal(cached, uncached) for cached, uncached in pairs)
        return {**figures, "identical": identical, "broken": False, "at_floor": at_floor}

    # --- what is kept

    def _key(self, setting: Setting, *prompts: Prompt) -> str:
        lpips = None if self._perceptual is None else self._perceptual.checksum
        of_setting = [setting.policy, setting.kind, setting.budget, setting.identity()]
        of_prompts = [[prompt.prompt_id, prompt.seed] for prompt in prompts]
        return canonical_sha256([self._identity, *of_setting, lpips, of_prompts])

    def _read_lines(self) -> dict[str, dict[str, Any]]:
        """Finished results by key; a line cut short by a crash is not finished."""
        if not self._lines_file.exists():
            return {}
        rows = {}
        for line in self._lines_file.read_text(encoding="utf-8").splitlines():
            try:
                item = json.loads(line)
                rows[item["key"]] = item["row"]
            except (ValueError, KeyError, TypeError):
                continue
        return rows

    def _append(self, key: str, row: dict[str, Any]) -> None:
        self._lines_file.parent.mkdir(parents=True, exist_ok=True)
        with self._lines_file.open("a", encoding="utf-8") as stream:
            # A newline first: whatever a crash cut short stays a line of its own.
            stream.write("\n" + json.dumps({"key": key, "row": row}, allow_nan=False))
