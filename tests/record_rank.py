"""One rank of a recording of the toy denoiser: started by torchrun, or forked with RANK and WORLD_SIZE set by hand."""

import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from recording_stub import Denoiser, generate_with, install


def record_rank(folder: Path, groups: int, seconds: float = 0.02, loses: int | None = None) -> None:
    """Record ``groups`` prompts of ``seconds`` each into ``folder/run``, and say in ``folder/<rank>.json`` which.

    The rank ``loses`` ends without a word in its first group, and the others wait for that to happen.
    """
    install()
    from calibrate import record

    rank, denoiser, seen = int(os.environ.get("RANK", 0)), Denoiser(), []
    generate, lost = generate_with(denoiser), folder / "lost"

    def call(prompt, seed):
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
    run = record("toy", generate=call, modules=denoiser, prompts=prompts, out=folder / "run", progress=False)
    missing = sorted({group.name for group in run.groups} - run.finished())
    (folder / f"{rank}.json").write_text(json.dumps({"recorded": seen, "missing": missing}))


if __name__ == "__main__":
    record_rank(Path(sys.argv[1]), int(sys.argv[2]))
