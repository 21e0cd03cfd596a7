"""What recording costs: time and memory against the plain denoiser and against the way of the public estimators.

    python -m benchmarks.recording [--shape NAME] [--rounds N]

The estimators copy the modulated input and the stack's output of every call to the host in float32 and compute the
distances when the generation is over (vLLM-Omni's coefficient_estimator.py, read at ad0db31). Their way is restated
here on the same hooks, so that only the bookkeeping differs.
"""

from dataclasses import replace
from itertools import pairwise

import click
import numpy as np
import torch

from benchmarks.common import alternate, peak_bytes, ratio, table, write
from benchmarks.workloads import Shape, build, chosen, generate
from calibrate.recording.recorder import Recorder
from runtime import denoisers


class Estimator:
    """Whole activations to the host, distances afterwards."""

    def __init__(self, model: torch.nn.Module) -> None:
        blocks = model.blocks if hasattr(model, "blocks") else model.transformer_blocks
        self._attention = blocks[0].attn1 if hasattr(blocks[0], "attn1") else blocks[0].attn
        self._exit = model.norm_out
        self.signals: list[np.ndarray] = []
        self.outputs: list[np.ndarray] = []

    def __enter__(self) -> "Estimator":
        def watch(kept: list[np.ndarray]):
            def hook(module, args, kwargs):
                hidden = kwargs.get("hidden_states", args[0] if args else None)
                kept.append(hidden.float().cpu().numpy())

            return hook

        self._handles = [
            self._attention.register_forward_pre_hook(watch(self.signals), with_kwargs=True),
            self._exit.register_forward_pre_hook(watch(self.outputs), with_kwargs=True),
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def pairs(self) -> list[tuple[float, float]]:
        def distances(kept: list[np.ndarray]) -> list[float]:
            return [
                float(np.abs(now - before).sum() / (np.abs(before).sum() + 1e-6))
                for before, now in pairwise(kept)
            ]

        return list(zip(distances(self.signals), distances(self.outputs), strict=True))

    @property
    def held_bytes(self) -> int:
        return sum(array.nbytes for array in self.signals + self.outputs)


def variants(shape: Shape) -> list[tuple[Shape, int]]:
    """The shape, and it with half the steps, a quarter of the tokens, half the width: what grows with what."""
    heads = shape.config["num_attention_heads"]
    fewer = replace(
        shape, tokens=(*shape.tokens[:-2], shape.tokens[-2] // 2, shape.tokens[-1] // 2)
    )
    narrow = replace(shape, config={**shape.config, "num_attention_heads": heads // 2})
    named = [
        (shape, shape.steps, ""),
        (shape, shape.steps // 2, ""),
        (fewer, shape.steps, ", a quarter of the tokens"),
    ]
    named.append((narrow, shape.steps, ", half the width"))
    return [(replace(one, title=one.title + words), steps) for one, steps, words in named]


def measure(shape: Shape, steps: int, rounds: int) -> dict:
    model = build(shape)
    held = {}

    def plain() -> None:
        generate(model, shape, steps)

    def recorded() -> None:
        with Recorder({"transformer": model}) as recorder:
            recorder.start()
            generate(model, shape, steps)
            held["record"] = recorder.held_bytes()
            assert recorder.finish().rows

    def estimated() -> None:
        with Estimator(model) as estimator:
            generate(model, shape, steps)
            held["estimator, on the host"] = estimator.held_bytes
            assert estimator.pairs()

    cases = {"plain": plain, "record": recorded, "estimator": estimated}
    seconds = alternate(cases, rounds)
    peaks = {name: peak_bytes(run) for name, run in cases.items()}
    hidden = _hidden_bytes(shape)
    return {
        "shape": shape.title,
        "steps": steps,
        "seconds": seconds,
        "record / plain": ratio(seconds, "record", "plain"),
        "estimator / plain": ratio(seconds, "estimator", "plain"),
        "peak_bytes": peaks,
        "extra_tensors_per_trajectory": None
        if peaks["plain"] is None
        else (peaks["record"] - peaks["plain"]) / hidden / shape.branches,
        "held_tensors_per_trajectory": held["record"] / hidden / shape.branches,
        "estimator_host_bytes": held["estimator, on the host"],
    }


@torch.inference_mode()
def measure_embedded(rounds: int, prompts: int, steps: int) -> dict:
    """The embedded model through its whole pipeline, text encoder and decoder included."""
    from calibrate.model.call import prepare_call
    from calibrate.model.checkpoint import find_checkpoint
    from calibrate.model.loading import load_pipeline
    from calibrate.model.prompts import load_prompts

    checkpoint = find_checkpoint("tiny-longcat-image")
    pipe = load_pipeline(checkpoint, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    call = prepare_call(type(pipe).__call__, checkpoint.spec, steps=steps)
    texts = [prompt.prompt for prompt in load_prompts("tiny-longcat-image", count=prompts).prompts]

    def plain() -> None:
        for text in texts:
            pipe(text, generator=torch.Generator().manual_seed(0), **call.arguments)

    def recorded() -> None:
        with Recorder(denoisers(pipe), pipe) as recorder:
            for text in texts:
                recorder.start()
                pipe(text, generator=torch.Generator().manual_seed(0), **call.arguments)
                assert recorder.finish().rows

    seconds = alternate({"plain": plain, "record": recorded}, rounds)
    return {
        "steps": steps,
        "prompts": prompts,
        "seconds": seconds,
        "record / plain": ratio(seconds, "record", "plain"),
    }


def _hidden_bytes(shape: Shape) -> int:
    tokens = int(np.prod(shape.tokens)) // (4 if shape.cls.startswith("Wan") else 1)
    width = shape.config["attention_head_dim"] * shape.config["num_attention_heads"]
    return tokens * width * torch.empty((), dtype=shape.dtype).element_size()


@click.command()
@click.option("--shape", "name", help="One shape only (default: all that fit this machine).")
@click.option("--rounds", default=3, show_default=True)
@click.option("--growth/--no-growth", default=True, help="Also fewer steps, tokens and channels.")
def main(name: str | None, rounds: int, growth: bool) -> None:
    """Time and memory of recording."""
    found = []
    for shape in chosen(name).values():
        found += [
            measure(*variant, rounds)
            for variant in (variants(shape) if growth else [(shape, shape.steps)])
        ]
    rows = [
        [
            case["shape"], case["steps"], case["record / plain"]["median"], case["estimator / plain"]["median"],
            case["held_tensors_per_trajectory"], case["extra_tensors_per_trajectory"],
            case["estimator_host_bytes"] / 2**20,
        ]
        for case in found
    ]  # fmt: skip
    columns = [
        "shape",
        "steps",
        "record/plain",
        "estimator/plain",
        "tensors held",
        "peak tensors",
        "estimator MiB",
    ]
    click.echo(table(columns, rows))
    tiny = measure_embedded(rounds, prompts=3, steps=50)
    click.echo(
        f"embedded model, whole pipeline, {tiny['prompts']} prompts x {tiny['steps']} steps x 2 branches: "
        f"record/plain {tiny['record / plain']['median']:.3f}"
    )
    click.echo(
        "tensors: of the stack's hidden size, per live trajectory; peak: measured on the GPU"
    )
    click.echo(f"{write('recording', {'cases': found, 'embedded': tiny})}")


if __name__ == "__main__":
    main()
