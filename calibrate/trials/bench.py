"""Uncached references, real runs under every setting, and what is kept of them.

Everything in the folder is resumable: a result is one line, named by the hash of all that it depends on, so that a new
fit makes only the gate's results anew.
"""

from __future__ import annotations

import json
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from calibrate.errors import InvalidOption
from calibrate.model.prompts import Prompt, PromptSet
from calibrate.model.protocol import canonical_sha256
from calibrate.recording.recorder import Recorder
from calibrate.runs.folder import write_atomically
from calibrate.runs.pairs import Run, load_run
from calibrate.trials.case import Case
from calibrate.trials.lpips import Lpips
from calibrate.trials.measures import HIGHEST_DB, MEASURES, compare, main_measure
from calibrate.trials.sampler import Reference, Sample, Sampler, computed_steps
from calibrate.trials.setting import SHOWN, Entered, Refused, Setting, replayed_patterns

TUNING_PROMPTS = 2
MEASURING_THREADS = 4  # SSIM of a 1024-pixel image takes 5 s of one core, a cached run often less
# Part of every key: figures of older versions are not mixed with these.
FORMAT = "capped at the floor"

Row = dict[str, Any]


class Bench:
    """Generates, measures and keeps: references, counts for tuning, results."""

    def __init__(
        self, case: Case, prompts: PromptSet, perceptual: Lpips | None, progress: bool
    ) -> None:
        self.case, self.prompts = case, prompts
        self._perceptual, self._progress = perceptual, progress
        self._bar: tqdm | None = None
        images = {**case.recorded_images, **prompts.images}
        self._sampler = Sampler(case.session, images, self._count)
        self._folder = case.folder / "verify"
        arguments = {name: str(value) for name, value in case.session.arguments.items()}
        self._identity = canonical_sha256([case.identity, arguments, FORMAT])
        self._seconds: dict[str, float] = {}  # of an uncached run, timed by this process
        self._loaded: dict[str, Reference] = {}

    def expect(self, runs: int) -> None:
        """One bar for so many generations, until results are all there; more are added as tuning asks for them."""
        if self._bar is None:
            self._bar = tqdm(desc="running", unit="run", disable=not self._progress, smoothing=0.1)
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
                self._make_reference(prompt).write(stem)
            self._loaded = {name: Reference.load(stem)}  # one at a time: videos are large
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
        mean, lowest = float(floors[name].mean()), float(floors[name].min())
        return {"identical": lowest >= HIGHEST_DB, name: mean, f"worst_{name}": lowest}

    def _name(self, prompt: Prompt) -> str:
        return f"{prompt.prompt_id}-{prompt.seed}-{self._identity[:12]}"

    def _make_reference(self, prompt: Prompt) -> Reference:
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
        self._seconds[self._name(prompt)] = second.seconds
        pairs = pd.DataFrame(rows).assign(prompt_id=prompt.prompt_id, seed=prompt.seed)
        floor = self._figures(second, first)
        return Reference(first.media, first.latents, pairs, floor)

    def _uncached_seconds(self, prompt: Prompt) -> float:
        """Wall time of an uncached run, timed anew by every process: machines are not always as busy."""
        name = self._name(prompt)
        if name not in self._seconds:
            self._seconds[name] = self._sampler(prompt).seconds
        return self._seconds[name]

    # --- runs

    def tuning_count(self, setting: Setting) -> float:
        """Mean computed steps of real runs of the tuning prompts under a setting."""
        prompts = (self.case.recorded_prompts or self.prompts.prompts)[:TUNING_PROMPTS]
        key = self._key(replace(setting, policy="", budget=0), *prompts)
        file = self._folder / "tuning.json"
        counts = json.loads(file.read_text()) if file.exists() else {}
        if key not in counts:
            samples = [self._sampler.run(setting, prompt) for prompt in prompts]
            counts[key] = float(np.mean([sample.computed_steps for sample in samples]))
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(counts).encode())
        return counts[key]

    def results(self, entered: Entered) -> tuple[pd.DataFrame, dict[str, str]]:
        """One row per setting and prompt, and the policies refused on the way; what is there is not run again."""
        done, refused = self._read_lines(), dict(entered.refused)
        prompts = self.prompts.prompts
        jobs = {
            self._key(setting, prompt): (prompt, setting)
            for prompt in prompts
            for setting in entered.settings
        }
        to_refer = sum(not self._has_reference(prompt) for prompt in prompts)
        self.expect(len(jobs.keys() - done) + 2 * to_refer)
        half = self.case.num_steps / 2
        budgets = {setting.budget for setting in entered.settings}
        shown = min(budgets, key=lambda budget: abs(budget - half), default=0)
        waiting: deque[tuple[str, Row, Future[Row]]] = deque()

        def keep_measured(most: int) -> None:
            """Write finished results; wait for the oldest while more than ``most`` are being measured."""
            while waiting and (len(waiting) > most or waiting[0][2].done()):
                key, row, figures = waiting.popleft()
                done[key] = {**row, **figures.result()}
                self._append(key, done[key])

        with closing(self), ThreadPoolExecutor(MEASURING_THREADS) as pool:
            for key, (prompt, setting) in jobs.items():
                if setting.policy in refused or key in done:
                    continue
                reference = self.reference(prompt)
                try:
                    row, sample = self._run(setting, prompt)
                except Refused as error:
                    refused[setting.policy] = str(error)
                    continue
                if setting.budget == shown and setting.policy in SHOWN and sample.is_drawable:
                    row["sample"] = self._keep_picture(f"{key[:16]}.npz", sample)
                    row["reference"] = f"{self._name(prompt)}.npz"
                waiting.append((key, row, pool.submit(self._measure, sample, reference)))
                keep_measured(self._most_waiting)
            keep_measured(0)
        rows = [done[key] for key in jobs if key in done]
        return pd.DataFrame([row for row in rows if row["policy"] not in refused]), refused

    @property
    def _most_waiting(self) -> int:
        """Samples that may wait to be measured. None on the CPU, where measuring would slow the timed runs down."""
        return 0 if self.case.identity["device"] == "cpu" else 2 * MEASURING_THREADS

    def _run(self, setting: Setting, prompt: Prompt) -> tuple[Row, Sample]:
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
            replayed = replayed_patterns(setting, self.reference(prompt).pairs)
            wrong = [
                sum(a != b for a, b in zip(replayed[name], pattern, strict=True))
                for name, pattern in sample.patterns.items()
            ]
            row["replayed"] = replayed
            row["replayed_steps"] = computed_steps(replayed)
            row["disagreement"] = float(np.mean(wrong))
        return row, sample

    def _keep_picture(self, name: str, sample: Sample) -> str:
        """The image, the middle frame of a video, or the series, as a file for the report; its name."""
        picture = sample.media[0]
        if picture.ndim == 4:
            picture = picture[len(picture) // 2]
        folder = self._folder / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        dtype = np.float32 if picture.ndim == 2 else np.float16  # pixels lie in [0, 1]
        np.savez_compressed(folder / name, image=picture.astype(dtype))
        return name

    def _measure(self, sample: Sample, reference: Reference) -> Row:
        """All measures of a sample against its reference, dB capped at the noise floor."""
        if not sample.is_finite:
            return {"identical": False, "broken": True, "at_floor": False}
        figures = self._figures(sample, reference)
        floor = {name: reference.floor[name] for name in figures if MEASURES[name].unit == "dB"}
        at_floor = all(figures[name] >= lowest for name, lowest in floor.items())
        figures |= {name: min(figures[name], lowest) for name, lowest in floor.items()}
        identical = all(map(np.array_equal, sample.media, reference.media))
        return {**figures, "identical": identical, "broken": False, "at_floor": at_floor}

    def _figures(self, sample: Sample, reference: Sample | Reference) -> dict[str, float]:
        """Every measure of a sample's media and latents, dB at most ``HIGHEST_DB``."""
        figures: dict[str, float] = {}
        for cached, uncached in zip(sample.media, reference.media, strict=True):
            figures |= compare(cached, uncached)
            if self._perceptual is not None and uncached.ndim >= 3:
                figures["lpips"] = self._perceptual(cached, uncached)
        own, latents = sample.latents, reference.latents
        if own is not None and latents is not None and own.shape == latents.shape:
            figures |= compare(own, latents, "latents")
        in_db = [name for name in figures if MEASURES[name].unit == "dB"]
        return figures | {name: min(figures[name], HIGHEST_DB) for name in in_db}

    # --- what is kept

    def _key(self, setting: Setting, *prompts: Prompt) -> str:
        lpips = self._perceptual and self._perceptual.checksum
        of_setting = [setting.policy, setting.kind, setting.budget, setting.identity()]
        of_prompts = [[prompt.prompt_id, prompt.seed] for prompt in prompts]
        return canonical_sha256([self._identity, *of_setting, lpips, of_prompts])

    @property
    def _lines(self) -> Path:
        return self._folder / "results.jsonl"

    def _read_lines(self) -> dict[str, Row]:
        """Finished results by key; a line cut short by a crash is not finished."""
        rows: dict[str, Row] = {}
        for line in self._lines.read_text("utf-8").splitlines() if self._lines.exists() else ():
            with suppress(ValueError, KeyError, TypeError):
                item = json.loads(line)
                rows[item["key"]] = item["row"]
        return rows

    def _append(self, key: str, row: Row) -> None:
        self._lines.parent.mkdir(parents=True, exist_ok=True)
        with self._lines.open("a", encoding="utf-8") as stream:
            # A newline first: whatever a crash cut short stays a line of its own.
            stream.write("\n" + json.dumps({"key": key, "row": row}, allow_nan=False))
