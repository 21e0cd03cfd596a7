"""Uncached references, real runs under every setting, and what is kept of them.

Everything in the folder is resumable: a result is one line, named by the hash of all that it depends on, so that a new
fit makes only the gate's results anew. Ranks share the prompts: each claims one after the other, and writes a file of
its own.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from calibrate.errors import InvalidOption
from calibrate.model.prompts import Prompt, PromptSet
from calibrate.model.protocol import canonical_sha256
from calibrate.recording.launch import rank
from calibrate.recording.recorder import Recorder
from calibrate.runs.lock import held
from calibrate.runs.pairs import Run, load_run
from calibrate.trials.case import Case
from calibrate.trials.lpips import Lpips
from calibrate.trials.measures import HIGHEST_DB, MEASURES, compare_all, main_measure
from calibrate.trials.sampler import Reference, Sample, Sampler
from calibrate.trials.setting import SHOWN, Refused, Setting, replayed

WAIT_SECONDS = 0.2  # between looks at what other ranks are at
# SSIM of a 1024-pixel image takes 5 s of one core, a cached run often less.
MEASURING_THREADS = 4
# Part of every key: figures of older versions are not mixed with these.
FORMAT = "capped at the floor"

Row = dict[str, Any]


class Bench:
    """Generates, measures and keeps: references and results.

    Args:
        lpips: Whether LPIPS is measured.
    """

    def __init__(
        self,
        case: Case,
        prompts: PromptSet,
        lpips: bool = False,
        progress: bool = True,
    ) -> None:
        self._perceptual = Lpips() if lpips else None
        self.case, self.prompts, self.progress = case, prompts, progress
        # By which ranks claim prompts; without it there are no other ranks.
        self._lock = held.get(case.folder)
        self._bar = tqdm(disable=True)
        images = {**case.recorded_images, **prompts.images}
        self.sampler = Sampler(case.session, images, self._count)
        self.folder = case.folder / "verify"
        arguments = {name: str(value) for name, value in case.session.arguments.items()}
        self._identity = canonical_sha256([case.identity, arguments, FORMAT])
        self._seconds: dict[Prompt, float] = {}  # of an uncached run, timed by this process
        self._loaded: dict[Prompt, Reference] = {}

    @contextmanager
    def bar(self, runs: int) -> Iterator[None]:
        """A bar of so many generations, and of those that come as tuning asks for them."""
        shown = {"desc": "running", "unit": "run", "smoothing": 0.1}
        silent = not (self.progress and runs)
        with tqdm(total=runs, disable=silent, **shown) as self._bar:
            yield

    def _count(self) -> None:
        if self._bar.total is not None:
            self._bar.total = max(self._bar.total, self._bar.n + 1)
        self._bar.update()

    # --- ranks

    def _claimed(self) -> Iterator[Prompt]:
        """The prompts that no other rank has; rank 0 stays until all are done, and takes what a lost rank left.

        A claim ends with the lock: by then the results are written.
        """
        waiting = dict(enumerate(self.prompts.prompts))
        while waiting:
            for index in list(waiting):
                if self._lock is None or self._lock.claim(index):
                    yield waiting.pop(index)
            if rank() != 0:
                return
            time.sleep(WAIT_SECONDS if waiting else 0)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What all ranks need is made by the first that comes; the others wait, and find it in the folder."""
        beyond = len(self.prompts.prompts)
        while self._lock is not None and not self._lock.claim(beyond):
            time.sleep(WAIT_SECONDS)
        yield
        if self._lock is not None:
            self._lock.release(beyond)

    # --- references

    def reference(self, prompt: Prompt) -> Reference:
        """The uncached result of a prompt, from the folder or made now."""
        if prompt not in self._loaded:
            stem = self._stem(prompt)
            if not self._has_reference(prompt):
                self._make_reference(prompt).write(stem)
            self._loaded = {prompt: Reference.load(stem)}  # one at a time: videos are large
        return self._loaded[prompt]

    def _stem(self, prompt: Prompt) -> Path:
        """What the names of its reference's files begin with."""
        name = f"{prompt.prompt_id}-{prompt.seed}-{self._identity[:12]}"
        return self.folder / "reference" / name

    def _has_reference(self, prompt: Prompt) -> bool:
        return self._stem(prompt).with_suffix(".json").exists()

    def signals(self) -> Run:
        """The recorded pairs of all held-out prompts, for an entry that comes without a run."""
        tables = [self.reference(prompt).pairs for prompt in self.prompts.prompts]
        return load_run(pd.concat(tables, ignore_index=True))

    def floor(self) -> dict[str, Any]:
        """The noise floor in dB, mean over the prompts and the lowest; identical where noise changes nothing."""
        floors = pd.DataFrame(
            [self.reference(prompt).floor for prompt in self.prompts.prompts]
        )
        name = main_measure(floors)
        mean, lowest = floors[name].agg(["mean", "min"]).tolist()
        return {"identical": lowest >= HIGHEST_DB, name: mean, f"worst_{name}": lowest}

    def _make_reference(self, prompt: Prompt) -> Reference:
        session = self.case.session
        watched = Recorder(session.modules, session.driver, blocks=session.blocks)
        with torch.inference_mode(), watched as recorder:
            recorder.start()
            first = self.sampler(prompt)
            rows = recorder.finish().rows
        if not first.is_finite:
            raise InvalidOption(
                f"prompt {prompt.prompt!r}: the uncached model itself makes NaN or infinity; "
                "try --dtype bfloat16 or float32"
            )
        # Timed without the recorder, and after it, so that it is warm.
        second = self.sampler(prompt, perturbed=True)
        self._seconds[prompt] = second.seconds
        floor = compare_all(second, first, self._perceptual)
        pairs = pd.DataFrame(rows).assign(prompt_id=prompt.prompt_id, seed=prompt.seed)
        return Reference(first.media, first.latents, pairs, floor)

    # --- runs

    def results(
        self, settings: Sequence[Setting], refused: Mapping[str, str] | None = None
    ) -> tuple[pd.DataFrame, dict[str, str]]:
        """One row per setting and prompt, and the policies refused before and on the way (policy -> reason).

        What is there is not run again. On ranks other than 0 the rows of the other ranks may be missing.
        """
        done, refused = self._read_lines(), dict(refused or {})
        prompts = self.prompts.prompts
        keys = {prompt: {self.key(s, prompt): s for s in settings} for prompt in prompts}
        every = [key for of_prompt in keys.values() for key in of_prompt]
        to_refer = sum(not self._has_reference(prompt) for prompt in prompts)
        half = self.case.num_steps / 2
        budgets = {setting.budget for setting in settings}
        shown = min(budgets, key=lambda budget: abs(budget - half), default=0)
        waiting: deque[tuple[str, Row, Future[Row]]] = deque()
        # None on the CPU, where measuring would slow the timed runs down.
        may_wait = 0 if self.case.identity["device"] == "cpu" else 2 * MEASURING_THREADS

        def keep_measured(most: int) -> None:
            """Write finished results; wait for the oldest while more than ``most`` are being measured."""
            while waiting and (len(waiting) > most or waiting[0][2].done()):
                key, row, figures = waiting.popleft()
                done[key] = {**row, **figures.result()}
                self._append(key, done[key])

        missing = sum(key not in done for key in every) + 2 * to_refer
        with self.bar(missing), ThreadPoolExecutor(MEASURING_THREADS) as pool:
            for prompt in self._claimed():
                # A rank that was lost may have begun with the prompt.
                done.update(self._read_lines())
                for key, setting in keys[prompt].items():
                    if setting.policy in refused or key in done:
                        continue
                    reference = self.reference(prompt)
                    try:
                        row, sample = self._run(setting, prompt)
                    except Refused as error:
                        refused[setting.policy] = str(error)
                        continue
                    if (
                        setting.budget == shown
                        and setting.policy in SHOWN
                        and sample.is_drawable
                    ):
                        row["sample"] = f"{key[:16]}.npz"
                        row["reference"] = f"{self._stem(prompt).name}.npz"
                        sample.write_picture(self.folder / "samples" / row["sample"])
                    waiting.append((key, row, pool.submit(self._measure, sample, reference)))
                    keep_measured(may_wait)
            keep_measured(0)
        rows = [done[key] for key in every if key in done]
        return pd.DataFrame([row for row in rows if row["policy"] not in refused]), refused

    def _run(self, setting: Setting, prompt: Prompt) -> tuple[Row, Sample]:
        # Timed anew by every process: machines are not always as busy.
        if prompt not in self._seconds:
            self._seconds[prompt] = self.sampler(prompt).seconds
        sample = self.sampler.run(setting, prompt)
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
            "uncached_seconds": self._seconds[prompt],
            "patterns": sample.patterns,
            "replayed": None,
        }
        if setting.kind == "gate":
            row |= replayed(setting, self.reference(prompt).pairs, sample.patterns)
        return row, sample

    def _measure(self, sample: Sample, reference: Reference) -> Row:
        """All measures of a sample against its reference, dB capped at the noise floor."""
        if not sample.is_finite:
            return {"identical": False, "broken": True, "at_floor": False}
        figures = compare_all(sample, reference, self._perceptual)
        floor = {
            name: reference.floor[name] for name in figures if MEASURES[name].unit == "dB"
        }
        at_floor = all(figures[name] >= lowest for name, lowest in floor.items())
        figures |= {name: min(figures[name], lowest) for name, lowest in floor.items()}
        identical = all(map(np.array_equal, sample.media, reference.media))
        return {**figures, "identical": identical, "broken": False, "at_floor": at_floor}

    # --- what is kept

    def key(self, setting: Setting, *prompts: Prompt) -> str:
        lpips = self._perceptual and self._perceptual.checksum
        of_setting = [setting.policy, setting.kind, setting.budget, setting.identity()]
        of_prompts = [[prompt.prompt_id, prompt.seed] for prompt in prompts]
        return canonical_sha256([self._identity, *of_setting, lpips, of_prompts])

    def _read_lines(self) -> dict[str, Row]:
        """Finished results of all ranks by key; a line cut short by a crash is not finished."""
        rows: dict[str, Row] = {}
        for file in sorted(self.folder.glob("results*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    item = json.loads(line)
                    rows[item["key"]] = item["row"]
        return rows

    def _append(self, key: str, row: Row) -> None:
        file = self.folder / (f"results-{rank()}.jsonl" if rank() else "results.jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            # A newline first: whatever a crash cut short stays a line of its own.
            stream.write("\n" + json.dumps({"key": key, "row": row}, allow_nan=False))
