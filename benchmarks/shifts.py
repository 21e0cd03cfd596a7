"""What `calibrate audit` says of a certified run under shifts: the second table of docs/certificates.md.

    calibrate certify runs/x
    python -m benchmarks.shifts runs/x --num-prompts 20

Weights and activations in 8 and 4 bits are simulated: rounded to the integers that a kernel would compute with. The
LoRA is a random change of rank 4 to weights, in a stated relation to their size.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.common import table
from calibrate import audit
from calibrate.model.checkpoint import find_checkpoint
from calibrate.model.loading import load_pipeline
from calibrate.runs.folder import RunFolder

RANK = 4


def quantise(module: torch.nn.Module, bits: int) -> None:
    """Round the weights of every linear layer per row and what it receives per token, to integers of ``bits``."""
    levels = 2 ** (bits - 1) - 1

    def rounded(values: torch.Tensor) -> torch.Tensor:
        step = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / levels
        return (values / step).round() * step

    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = rounded(layer.weight.data)
            layer.register_forward_pre_hook(lambda _, inputs: tuple(map(rounded, inputs)))


def adapt(module: torch.nn.Module, size: float, where: str = "attn") -> None:
    """Add a random change of low rank to the linear layers named so, ``size`` times as large as their weights."""
    random = torch.Generator().manual_seed(0)
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear) and where in name:
            rows, columns = layer.weight.shape
            change = torch.randn(rows, RANK, generator=random) @ torch.randn(
                RANK, columns, generator=random
            )
            change *= size * layer.weight.data.float().norm() / change.norm()
            layer.weight.data += change.to(layer.weight.dtype)


Change = Callable[[torch.nn.Module], None]
SHIFTS: dict[str, tuple[Change, dict[str, Any]]] = {
    "none": (lambda module: None, {}),
    "W8A8": (lambda module: quantise(module, 8), {}),
    "W4A4": (lambda module: quantise(module, 4), {}),
    "guidance 6": (lambda module: None, {"pipe_args": {"guidance_scale": 6.0}}),
    "guidance 20": (lambda module: None, {"pipe_args": {"guidance_scale": 20.0}}),
    "LoRA of the attention, 10 %": (lambda module: adapt(module, 0.1), {}),
    "LoRA of the attention, 100 %": (lambda module: adapt(module, 1.0), {}),
    "LoRA of the attention, 1000 %": (lambda module: adapt(module, 10.0), {}),
    "LoRA of all linear layers, 100 %": (lambda module: adapt(module, 1.0, ""), {}),
}


@click.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--num-prompts", default=20, show_default=True)
@click.option(
    "--shift",
    "names",
    multiple=True,
    type=click.Choice(list(SHIFTS)),
    help="[default: all]",
)
def main(run: Path, num_prompts: int, names: tuple[str, ...]) -> None:
    """Audit a certified run under every shift."""
    manifest = RunFolder.open(run).manifest
    rows = []
    for name in names or SHIFTS:
        change, options = SHIFTS[name]
        checkpoint = find_checkpoint(manifest["model"])
        pipe = load_pipeline(checkpoint, dtype=manifest["protocol"]["dtype"], device="auto")
        change(pipe.transformer)
        for found in audit(run, model=pipe, num_prompts=num_prompts, **options):
            measure = next(iter(found.certificate.limits))
            lowest = float(found.results[measure].min())
            rows.append([name, found.certificate.tier, lowest, found.verdict])
    click.echo(table(["shift", "tier", "lowest", "holds"], rows))


if __name__ == "__main__":
    main()
