"""The recording loop: ranks claim the prompts that a run still lacks, one at a time."""

import gc
import logging
import time
from collections.abc import Iterable
from typing import Any

from calibrate.errors import CalibrateError, Incomplete
from calibrate.model.session import Session
from calibrate.recording.launch import Party, rank, restarts, world_size
from calibrate.runs.folder import Group, RunFolder
from calibrate.runs.lock import RunLock
from coeffs.errors import CoeffsError
from runtime.errors import RuntimeCacheError

# So many first prompts failing alike mean that the call is wrong, not the prompts.
_SAME_FAILURES = 3
_WAIT_SECONDS = 0.2  # between looks at the groups that other ranks are recording
# They say what to do about the model or the run, and would be the same for every prompt.
_EXPECTED = (CalibrateError, CoeffsError, RuntimeCacheError)

logger = logging.getLogger(__name__)


class Loop:
    """Records the prompts a run still lacks; ranks claim them one at a time.

    ``anew`` names finished groups that are recorded again for their Gram matrices, at most once by each process.
    """

    def __init__(
        self,
        run: RunFolder,
        session: Session,
        recorder: Any,
        lock: RunLock,
        party: Party,
        anew: Iterable[str] = (),
    ) -> None:
        self.run = run
        self.session = session
        self.recorder = recorder
        self.lock = lock
        self.party = party
        self.anew = set(anew)
        self.images = run.images
        self.job = f"{lock.job}#{restarts()}"
        self.outcomes: list[str | None] = []  # a failure's text, or None for a success

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
            show(bar, self.run)
        self.party.announce(None)

    def follow(self) -> None:
        """Run the generations that the party's leading rank announces."""
        groups = self.run.groups
        while (index := self.party.follow()) is not None:
            self._record(groups[index])

    def _is_wanted(self, group: Group) -> bool:
        if group.name in self.anew:
            return group.name not in self.run.with_gram()
        return not self.run.is_finished(group) and self.run.failed_in(group) != self.job

    def _claim_and_record(self, group: Group, bar: Any) -> bool:
        if not self.lock.claim(group.index):
            return False
        try:
            if not self._is_wanted(group):  # another rank was faster
                return False
            self.party.announce(group.index)
            self._record(group)
        finally:
            self.lock.release(group.index)
        show(bar, self.run)
        first, *others = self.outcomes
        if first and others == [first] * (_SAME_FAILURES - 1):
            self.party.announce(None)
            raise Incomplete(
                f"{self.run.path}: the first {_SAME_FAILURES} prompts all failed alike ({first}); stopped"
            )
        return True

    def _record(self, group: Group) -> None:
        """Generate and measure one group; whatever a pipeline raises costs this prompt and no other."""
        self.anew.discard(group.name)
        try:
            self.recorder.start()
            self.session.generate(group.prompt, self.images)
            recording = self.recorder.finish()
        except _EXPECTED:
            raise
        except Exception as error:
            message = " ".join((str(error) or repr(error)).split())[:500]
            self._fail(group, _kind_of(error), message)
            _free_memory()
            return
        if not recording.rows:
            self._fail(group, "no pairs", "the denoiser was called less than twice")
            return
        self.outcomes.append(None)
        if self.party.leads:
            self.run.write_group(group, recording.rows, recording.timing, recording.gram)
        if self.party.leads and recording.non_finite:
            logger.warning(
                "%s: %d of %d pairs are not finite; kept, left out of every fit",
                group.name,
                recording.non_finite,
                len(recording.rows),
            )

    def _fail(self, group: Group, kind: str, message: str) -> None:
        self.outcomes.append(f"{kind}: {message}")
        if self.party.leads:
            self.run.write_failure(group, kind, message, self.job)
            logger.warning(
                "%s failed (%s: %s); the next start tries it again", group.name, kind, message
            )


def show(bar: Any, run: RunFolder) -> None:
    """What all ranks have finished, not only this one."""
    bar.n = len(run.finished())
    bar.refresh()


def _kind_of(error: Exception) -> str:
    import torch

    text = str(error).lower()
    # torch's CPU allocator raises a plain RuntimeError.
    out_of_memory = "out of memory" in text or "can't allocate memory" in text
    if out_of_memory or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "out of memory"
    return type(error).__name__


def _free_memory() -> None:
    """Give back what a failed generation held, so that the next prompt has the room of the first."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
