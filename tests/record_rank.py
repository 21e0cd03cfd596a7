"""One rank of a recording of the toy denoiser: started by torchrun, or forked with RANK and WORLD_SIZE set by hand."""

import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch
from recording_stub import Denoiser, generate_with, install

import runtime.compat.diffusers_private


def record_rank(
    folder: Path,
    groups: int,
    seconds: float = 0.02,
    loses: int | None = None,
    together: bool = False,
) -> None:
    """Record ``groups`` prompts of ``seconds`` each into ``folder/run``, and say in ``folder/<rank>.json`` which.

    The rank ``loses`` ends without a word in its first group, and the others wait for that to happen. With
    ``together`` every generation has a collective in it, as under context parallelism.
    """
    install()
    from calibrate import record

    rank, denoiser, seen = int(os.environ.get("RANK", 0)), Denoiser(), []
    generate, lost = generate_with(denoiser), folder / "lost"

    if together:
        runtime.compat.diffusers_private.lockstep_group = lambda module: (
            torch.distributed.group.WORLD
        )
        store = f"file://{folder}/rendezvous"
        world = int(os.environ["WORLD_SIZE"])
        torch.distributed.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=world
        )

    def call(prompt, seed):
        if together:
            prompts = [None] * int(os.environ["WORLD_SIZE"])
            torch.distributed.all_gather_object(prompts, prompt)
            assert len(set(prompts)) == 1
        if rank == loses:
            lost.touch()
            os._exit(9)
        while loses is not None and not lost.exists():
            time.sleep(0.01)
        seen.append(prompt)
        if prompt == "bad":
            raise RuntimeError("no luck")
        generate(prompt, seed)
        time.sleep(seconds)

    prompts = [f"prompt {i}" if i != 2 else "bad" for i in range(groups)]
    run = record(
        "toy",
        generate=call,
        modules=denoiser,
        prompts=prompts,
        out=folder / "run",
        progress=False,
    )
    missing = sorted({group.name for group in run.groups} - run.finished())
    (folder / f"{rank}.json").write_text(json.dumps({"recorded": seen, "missing": missing}))
    if together:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    record_rank(Path(sys.argv[1]), int(sys.argv[2]))
