"""Which process this is among those of one launch, and which of them have to work together."""

import os
from collections.abc import Mapping
from typing import Any

from calibrate.runs.lock import rank as rank


def world_size() -> int:
    """How many processes the launch has, else 1."""
    return max(1, int(os.environ.get("WORLD_SIZE", 1)))


class Party:
    """The ranks that run every forward of a denoiser together; its first one chooses what is recorded, and writes.

    Usually a party of one. Under context or tensor parallelism (``enable_parallelism`` of diffusers) it is the whole
    group: a rank that went for a prompt of its own would wait for ever in the first collective.
    """

    def __init__(self, modules: Mapping[str, Any]) -> None:
        from runtime.compat.diffusers_private import lockstep_group

        groups = [lockstep_group(module) for module in modules.values()]
        self._group: Any = next((group for group in groups if group is not None), None)
        self.leads = True
        if self._group is not None:
            import torch.distributed

            self._distributed = torch.distributed
            self.leads = torch.distributed.get_rank(self._group) == 0

    def agreed(self, index: int | None = None) -> int | None:
        """The group that comes next, as the leading rank says it to the others; None ends their part."""
        if self._group is None:
            return index
        box = [index]
        first = self._distributed.get_global_rank(self._group, 0)
        self._distributed.broadcast_object_list(box, src=first, group=self._group)
        return box[0]
