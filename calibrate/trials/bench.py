"""The bench of a verification: uncached references, real runs under every setting, and what is kept of them.

Everything in the folder is resumable: a result is one line, named by the hash of all that it depends on, so that a new
fit makes only the gate's results anew.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import coeffs
from calibrate.errors import InvalidOption
from calibrate.fitting.replay import polynomials, replay
from calibrate.model.prompts import Prompt, PromptSet
from calibrate.model.protocol import canonical_sha256
from calibrate.runs.folder import write_atomically
from calibrate.runs.pairs import Run, load_run
from calibrate.trials import measures as metrics
from calibrate.trials.baselines import Setting, disagreement
from calibrate.trials.case import Case
from calibrate.trials.lpips import Lpips
from calibrate.trials.sampler import Refused, Sample, Sampler, computed_steps
from calibrate.verifying.lineup import GATE, Contest, branches_of, gate_config
from coeffs import Entry

TUNING_PROMPTS = 2
SHOWN_PROMPTS = 3  # whose samples are kept for the report


class Bench:
    """Generates, measures and keeps: references, counts for tuning, results."""

    def __init__(
        self, case: Case, prompts: PromptSet, perceptual: Lpips | None, progress: bool
    ) -> None:
        self.case, self.prompts, self._perceptual, self._progress = (
            case,
            prompts,
            perceptual,
            progress,
        )
        self.entries: dict[str, Entry] = {}
        self._sampler = Sampler(case.pipeline, case.arguments, case.accepts)
        self._folder = case.folder / "verify"
        self._identity = canonical_sha256(
            [case.identity, {k: str(v) for k, v in case.arguments.items()}]
        )
        self._counts_file = self._folder / "tuning.json"
        self._lines_file = self._folder / "results.jsonl"
        self._counts = (
            json.loads(self._counts_file.read_text()) if self._counts_file.exists() else {}
        )
        self._seconds: dict[str, float] = {}  # of an uncached run, timed by this process
        self._loaded: dict[str, tuple[list[np.ndarray], np.ndarray | None, dict, pd.DataFrame]] = {}

    # --- references

    def facts(self, prompt: Prompt) -> dict[str, Any]:
        """Noise floor of the uncached model on a prompt: how two runs of it differ."""
        return json.loads((self._folder / "reference" / f"{self._name(prompt)}.json").read_text())

    def _name(self, prompt: Prompt) -> str:
        return f"{prompt.prompt_id}-{prompt.seed}-{self._identity[:12]}"

    def reference(
        self, prompt: Prompt
    ) -> tuple[list[np.ndarray], np.ndarray | None, dict, pd.DataFrame]:
        """Uncached media and latents of a prompt, facts (noise floor) and its recorded pairs."""
        name = self._name(prompt)
        if name in self._loaded:
            return self._loaded[name]
        folder = self._folder / "reference"
        facts_file = folder / f"{name}.json"
        if not facts_file.exists():
            self._make_reference(prompt, folder / name, facts_file)
        with np.load(folder / f"{name}.npz") as arrays:
            media = [arrays[key] for key in sorted(arrays.files) if key.startswith("media")]
            latents = arrays["latents"] if "latents" in arrays.files else None
        facts = json.loads(facts_file.read_text())
        pairs = pd.read_parquet(folder / f"{name}.parquet")
        self._loaded = {name: (media, latents, facts, pairs)}  # one at a time: videos are large
        return self._loaded[name]

    def _make_reference(self, prompt: Prompt, stem: Path, facts_file: Path) -> None:
        import torch

        from calibrate.recording.recorder import Recorder

        images = self.case.open_images(prompt, self.prompts)
        with torch.inference_mode(), Recorder(self.case.modules, self.case.pipeline) as recorder:
            recorder.start()
            first = self._sampler(prompt, images)
            rows = recorder.finish().rows
        # Timed without the recorder, and after it, so that it is warm.
        second = self._sampler(prompt, images)
        if not all(np.isfinite(array).all() for array in first.media):
            raise InvalidOption(
                f"prompt {prompt.prompt!r}: the uncached model itself makes NaN or infinity; "
                "try --dtype bfloat16 or float32"
            )
        stem.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f"media{i}": array for i, array in enumerate(first.media)}
        if first.latents is not None:
            arrays["latents"] = first.latents
        np.savez_compressed(stem.with_name(stem.name + ".npz"), **arrays)
        table = pd.DataFrame(
            [{**row, "prompt_id": prompt.prompt_id, "seed": prompt.seed} for row in rows]
        )
        table.to_parquet(stem.with_name(stem.name + ".parquet"))
        floor = self._measure(second, first.media, first.latents)
        self._seconds[stem.name] = second.seconds
        facts = {"floor": floor, "prompt": prompt.prompt}
        write_atomically(
            facts_file, json.dumps(facts).encode()
        )  # last: it makes the reference whole

    def _uncached_seconds(self, prompt: Prompt) -> float:
        """Wall time of an uncached run, timed anew when a verification continues: machines are not always as busy."""
        name = self._name(prompt)
        if name not in self._seconds:
            self._seconds[name] = self._sampler(
                prompt, self.case.open_images(prompt, self.prompts)
            ).seconds
        return self._seconds[name]

    def signals(self) -> Run:
        """The recorded pairs of all held-out prompts, for an entry that comes without a run."""
        return load_run(
            pd.concat(
                [self.reference(prompt)[3] for prompt in self.prompts.prompts], ignore_index=True
            )
        )

    # --- tuning

    def tuning_count(self, setting: Setting) -> float:
        """Mean computed steps of real runs of the tuning prompts under a setting."""
        prompts = (
            self.case.recorded_prompts[:TUNING_PROMPTS] or self.prompts.prompts[:TUNING_PROMPTS]
        )
        key = self._key(replace(setting, policy="", budget=0), *prompts)
        if key not in self._counts:
            counts = []
            for prompt in prompts:
                images = self.case.open_images(prompt, self.prompts)
                counts.append(
                    self._sampler.run(setting, prompt, images, entries=self.entries).computed_steps
                )
            self._counts[key] = float(np.mean(counts))
            write_atomically(self._counts_file, json.dumps(self._counts, indent=0).encode())
        return self._counts[key]

    # --- results

    def results(self, entered: Contest) -> tuple[pd.DataFrame, dict[str, str]]:
        """Every setting on every prompt; what is there already is not run again."""
        from tqdm import tqdm

        done, refused = self._read_lines(), dict(entered.refused)
        rows = []
        total = len(self.prompts.prompts) * len(entered.settings)
        with tqdm(
            total=total, desc="verifying", unit="run", disable=not self._progress, smoothing=0.1
        ) as bar:
            for index, prompt in enumerate(self.prompts.prompts):
                for setting in entered.settings:
                    bar.update()
                    if setting.policy in refused:
                        continue
                    key = self._key(setting, prompt)
                    if key not in done:
                        try:
                            done[key] = self._run(setting, prompt, keep=index < SHOWN_PROMPTS)
                        except Refused as error:
                            refused[setting.policy] = str(error)
                            continue
                        self._append(key, done[key])
                    rows.append(done[key])
        frame = pd.DataFrame(rows)
        return frame[~frame["policy"].isin(refused)] if len(frame) else frame, refused

    def _run(self, setting: Setting, prompt: Prompt, keep: bool) -> dict[str, Any]:
        media, latents, _, pairs = self.reference(prompt)
        uncached_seconds = self._uncached_seconds(prompt)
        images = self.case.open_images(prompt, self.prompts)
        sample = self._sampler.run(setting, prompt, images, entries=self.entries)
        row = {
            "policy": setting.policy,
            "budget": setting.budget,
            "prompt_id": prompt.prompt_id,
            "seed": prompt.seed,
            "prompt": prompt.prompt,
            "threshold": setting.parameters.get("threshold"),
            "computed_steps": sample.computed_steps,
            "num_steps": self.case.num_steps,
            "seconds": sample.seconds,
            "uncached_seconds": uncached_seconds,
            "patterns": sample.patterns,
            "replayed": None,
            **self._measure(sample, media, latents),
        }
        if setting.kind == "gate":
            replayed = self._replayed(setting, pairs)
            row["replayed"] = replayed
            row["replayed_steps"] = computed_steps(replayed)
            row["disagreement"] = float(
                np.mean([disagreement(replayed[b], p) for b, p in sample.patterns.items()])
            )
            if keep and setting.policy == GATE and sample.media[0].ndim > 2:
                name = self._key(setting, prompt)[:16]
                frame = (
                    sample.media[0]
                    if sample.media[0].ndim == 3
                    else sample.media[0][len(sample.media[0]) // 2]
                )
                (self._folder / "samples").mkdir(parents=True, exist_ok=True)
                np.savez_compressed(
                    self._folder / "samples" / f"{name}.npz", image=frame.astype(np.float16)
                )
                row["sample"] = f"{name}.npz"
                row["reference"] = f"{self._name(prompt)}.npz"
        return row

    def _replayed(self, setting: Setting, pairs: pd.DataFrame) -> dict[str, str]:
        """The pattern of every branch that replay foresees from the uncached run's signals."""
        entry, run, threshold = (
            self.entries[setting.policy],
            load_run(pairs),
            setting.parameters["threshold"],
        )
        mode = branches_of(setting.policy, entry)
        table = replay(
            run, polynomials(entry, run), [threshold], gate_config(entry), entry.signal, mode
        )
        return {f"{row.expert}/{row.branch}": row.pattern for row in table.itertuples()}

    def _measure(
        self, sample: Sample, media: list[np.ndarray], latents: np.ndarray | None
    ) -> dict[str, Any]:
        """All measures of a sample against its reference; infinite ones as None beside ``identical``."""
        if not all(np.isfinite(array).all() for array in sample.media):
            return {"identical": False, "broken": True}
        found: dict[str, Any] = {}
        for cached, uncached in zip(sample.media, media, strict=True):
            found |= metrics.compare(cached, uncached)
            if self._perceptual is not None and uncached.ndim >= 3:
                found["lpips"] = self._perceptual(cached, uncached)
        if (
            latents is not None
            and sample.latents is not None
            and latents.shape == sample.latents.shape
        ):
            found["latent_rel_l2"] = metrics.latent_rel_l2(sample.latents, latents)
        identical = all(np.array_equal(a, b) for a, b in zip(sample.media, media, strict=True))
        values = {name: value if np.isfinite(value) else None for name, value in found.items()}
        return values | {"identical": identical, "broken": False}

    def _key(self, setting: Setting, *prompts: Prompt) -> str:
        parameters = dict(setting.parameters)
        if "entry" in parameters:
            parameters["entry"] = _content(self.entries[parameters["entry"]])
        lpips = None if self._perceptual is None else self._perceptual.checksum
        return canonical_sha256([
            self._identity, setting.policy, setting.kind, setting.budget, parameters, lpips,
            [[prompt.prompt_id, prompt.seed] for prompt in prompts],
        ])  # fmt: skip

    def _read_lines(self) -> dict[str, dict]:
        """Finished results by key; a line cut short by a crash is not finished."""
        found = {}
        if self._lines_file.exists():
            for line in self._lines_file.read_text(encoding="utf-8").splitlines():
                try:
                    item = json.loads(line)
                    found[item["key"]] = item["row"]
                except (ValueError, KeyError, TypeError):
                    continue
        return found

    def _append(self, key: str, row: dict) -> None:
        self._lines_file.parent.mkdir(parents=True, exist_ok=True)
        with self._lines_file.open("a", encoding="utf-8") as stream:
            # A newline first: whatever a crash cut short stays a line of its own.
            stream.write("\n" + json.dumps({"key": key, "row": row}, allow_nan=False))


def _content(entry: Entry) -> str:
    """Hash of what decides: coefficients, domain, signs, window; not of the tables and words beside them."""
    bare = replace(
        entry, thresholds=(), plans=None, warnings=(), notes=None, source=coeffs.Source()
    )
    return canonical_sha256(coeffs.dump(bare))
