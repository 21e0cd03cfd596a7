"""The recording loop: ranks claim the prompts that a run still lacks, one at a time."""

import gc
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibrate.errors import EXPECTED, Incomplete, one_line
from calibrate.model.session import Session
from calibrate.recording.launch import Party, rank, world_size
from calibrate.recording.notes import costs
from calibrate.runs.folder import Group, RunFolder
from calibrate.runs.lock import RunLock
from calibrate.runs.trajectory import Trajectory

OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory", re.IGNORECASE)
# So many first prompts failing alike mean that the call is wrong, not the prompts.
_SAME_FAILURES = 3
_WAIT_SECONDS = 0.2  # between looks at the groups that other ranks are recording

logger = logging.getLogger(__name__)


@dataclass
class Loop:
    """Records the prompts a run still lacks; ranks claim them one at a time.

    Attributes:
        trajectories: Where what the solver saw is kept; None where planning could not use it.
        anew: Finished groups that are recorded again for their Gram matrices, at most once by each process.
        held: Bytes that the recorder held at the end of the latest generation.
        kept: Bytes that its latents take on disk.
        outcomes: Of each prompt in turn a failure's text, or None for a success.
    """

    run: RunFolder
    session: Session
    recorder: Any
    lock: RunLock
    party: Party
    trajectories: Path | None
    anew: set[str]
    outcomes: list[str | None] = field(default_factory=list)
    held: int = 0
    kept: int = 0

    @property
    def job(self) -> str:
        """Processes that torchrun has started again are a new job, and try again what failed before."""
        return f"{self.lock.job}#{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"

    def lead(self, bar: Any) -> None:
        """Claim one group after the other until all are there, or in other hands."""
        groups = self.run.groups
        # Ranks begin apart and rarely reach for the same group.
        start = rank() * len(groups) // world_size()
        groups = groups[start:] + groups[:start]
        while missing := [group for group in groups if self._is_wanted(group)]:
            recorded = [self._claim_and_record(group, bar) for group in missing]
            if not any(recorded):
                if rank() != 0:
                    break  # the rest is in other hands, and rank 0 stays until it is done
                time.sleep(_WAIT_SECONDS)
            self._show(bar)
        self._show(bar)
        self.party.agreed(None)

    def follow(self) -> None:
        """Run the generations that the party's leading rank announces."""
        groups = self.run.groups
        while (index := self.party.agreed()) is not None:
            self._record(groups[index])

    def _is_wanted(self, group: Group) -> bool:
        if group.name in self.anew:
            return group.name not in self.run.with_gram()
        return (
            not self.run.shard(group.name).exists() and self.run.failed_in(group) != self.job
        )

    def _claim_and_record(self, group: Group, bar: Any) -> bool:
        if not self.lock.claim(group.index):
            return False
        try:
            if not self._is_wanted(group):  # another rank was faster
                return False
            self.party.agreed(group.index)
            begun = time.monotonic()
            self._record(group)
            seconds = time.monotonic() - begun
        finally:
            self.lock.release(group.index)
        self._show(bar)
        if not bar.disable and self.outcomes == [None]:
            todo = len(self.run.missing()) + len(self.anew)
            bar.write(costs(seconds, todo, self.held, self.kept), file=sys.stderr)
        first, *others = self.outcomes
        if first and others == [first] * (_SAME_FAILURES - 1):
            self.party.agreed(None)
            raise Incomplete(
                f"{self.run.path}: the first {_SAME_FAILURES} prompts all failed alike ({first}); stopped"
            )
        return True

    def _record(self, group: Group) -> None:
        """Generate and measure one group; whatever a pipeline raises costs this prompt and no other."""
        self.anew.discard(group.name)
        try:
            self.recorder.start()
            self.session.generate(group.prompt, self.run.images)
            self.held = self.recorder.held_bytes()
            recording = self.recorder.finish()
        except EXPECTED:
            raise
        except Exception as error:
            message = " ".join((str(error) or repr(error)).split())[:500]
            # torch's CPU allocator raises a plain RuntimeError.
            memory = isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error))
            kind = "out of memory" if memory else type(error).__name__
            self._fail(group, kind, message)
            import torch

            # What a failed generation held, so that the next prompt has the room of the first.
            gc.collect()
            torch.cuda.empty_cache()
            return
        if not recording.rows:
            self._fail(group, "no pairs", "the denoiser was called less than twice")
            return
        self.outcomes.append(None)
        if self.party.leads:
            self.run.write_group(group, recording.rows, recording.timing, recording.gram)
            if self.trajectories is not None and recording.trajectory is not None:
                self._keep(recording.trajectory, self.trajectories / f"{group.name}.npz")
        if self.party.leads and recording.non_finite:
            logger.warning(
                "%s: %d of %d pairs are not finite; kept, left out of every fit",
                group.name,
                recording.non_finite,
                len(recording.rows),
            )

    def _keep(self, make: Callable[[], Trajectory | None], file: Path) -> None:
        """Keep what the solver saw; whatever goes wrong costs no pairs: planning runs again what it lacks."""
        try:
            trajectory = make()
            if trajectory is not None:
                trajectory.write(file)
                self.kept = trajectory.latents.nbytes
        except Exception as error:
            reason = one_line(error) or type(error).__name__
            logger.warning(
                "%s: no trajectory (%s); its pairs are kept, planning runs it again",
                file.stem,
                reason,
            )

    def _fail(self, group: Group, kind: str, message: str) -> None:
        self.outcomes.append(f"{kind}: {message}")
        if self.party.leads:
            self.run.write_failure(group, kind, message, self.job)
            logger.warning(
                "%s failed (%s: %s); the next start tries it again",
                group.name,
                kind,
                message,
            )

    def _show(self, bar: Any) -> None:
        """What all ranks have finished, not only this one."""
        bar.n = len(self.run.finished())
        bar.refresh()
