"""Generations that stop at every step of their solver, so that many prompts can be looked at side by side.

Each generation is the pipeline's own call, in a thread and with a scheduler of its own; only one of them runs at any
time. What ``scheduler.step`` receives is the prediction after guidance, whatever rule made it; it can be replaced.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class StepCall:
    """A call of ``scheduler.step`` that has not been made yet."""

    index: int
    scheduler: Any
    arguments: dict[str, Any]

    @property
    def prediction(self) -> torch.Tensor:
        return self.arguments["model_output"]

    @property
    def latents(self) -> torch.Tensor:
        return self.arguments["sample"]

    def advanced(
        self, predictions: list[torch.Tensor], latents: torch.Tensor
    ) -> torch.Tensor:
        """Latents after this step and the next ones with these predictions, by a copy of the scheduler, in float32.

        Noise that a stochastic scheduler adds is the noise that the real steps will add.
        """
        arguments = dict(self.arguments)
        generator = arguments.get("generator")
        if isinstance(generator, torch.Generator):
            arguments["generator"] = torch.Generator(generator.device)
            arguments["generator"].set_state(generator.get_state())
        if "return_dict" in inspect.signature(type(self.scheduler).step).parameters:
            arguments["return_dict"] = False
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.__dict__.pop("step", None)
        times = [arguments["timestep"], *self.scheduler.timesteps[self._place() + 1 :]]
        sample = latents.float()
        with torch.random.fork_rng(enabled=generator is None):
            for prediction, time in zip(predictions, times, strict=False):
                given = {
                    "model_output": prediction.float(),
                    "timestep": time,
                    "sample": sample,
                }
                sample = scheduler.step(**{**arguments, **given})[0]
        return sample

    def _place(self) -> int:
        """Where in the schedule this step is: pipelines may begin in its middle (image to image)."""
        time = torch.as_tensor(self.arguments["timestep"]).cpu().flatten()[0]
        same = (self.scheduler.timesteps.cpu() == time).nonzero().flatten().tolist()
        return min(same, key=lambda at: abs(at - self.index), default=self.index)


class Generation(threading.Thread):
    """One pipeline call that waits at every step of the solver until :meth:`resume`.

    Attributes:
        call: The step at which it waits; ``None`` before the first and after the last.
        expert: The denoiser that ran last.
        output: What the pipeline returned.
    """

    def __init__(self, pipeline: Any, generate: Callable[[Any], Any]) -> None:
        super().__init__(daemon=True)
        self._pipeline = copy.copy(pipeline)
        self._pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
        self._generate = generate
        self.call: StepCall | None = None
        self.output: Any = None
        self.expert = ""
        self._stepped: torch.Tensor | None = None
        self._index = 0
        # Outputs of the denoiser in the present step, and how many of them were asked for.
        self._kept: list[Any] = []
        self._asked = 0
        self._skips = self._abandoned = False
        self._error: BaseException | None = None
        self._stopped, self._resumed = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        scheduler = self._pipeline.scheduler
        original = scheduler.step
        signature = inspect.signature(original)

        @functools.wraps(original)  # pipelines look at its signature
        def step(*args: Any, **kwargs: Any) -> Any:
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            self.call = StepCall(self._index, scheduler, arguments)
            self._index += 1
            self._stopped.release()
            self._resumed.acquire()
            if self._abandoned:
                raise _Abandoned
            self._asked = 0
            stepped = original(**arguments)
            self._stepped = stepped[0] if isinstance(stepped, tuple) else stepped.prev_sample
            return stepped

        scheduler.step = step
        try:
            with torch.inference_mode():
                self.output = self._generate(self._pipeline)
        except BaseException as error:  # handed to the thread that waits
            self._error = error
        self.call = None
        self._stopped.release()

    def resume(
        self,
        prediction: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        *,
        skip_next: bool = False,
    ) -> StepCall | None:
        """Go on to the next step.

        Args:
            prediction: What the solver gets instead of the pipeline's own.
            latents: What the solver steps from instead of the pipeline's own.
            skip_next: The next prediction is not needed: the denoiser returns what it returned last.
        """
        self._skips = skip_next
        if self.ident is None:
            self.start()
        else:
            own = self.waiting.arguments
            for name, given in (("model_output", prediction), ("sample", latents)):
                if given is not None:
                    own[name] = given.to(own[name])
            self._resumed.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return self.call

    @property
    def waiting(self) -> StepCall:
        """The step at which it waits.

        Raises:
            RuntimeError: It waits at none.
        """
        if self.call is None:
            raise RuntimeError(
                "the generation has ended: its pipeline makes fewer solver steps than expected"
            )
        return self.call

    @property
    def latents(self) -> torch.Tensor:
        """The latents before the step at which it waits, or after its last step."""
        if self.call is None and self._stepped is not None:
            return self._stepped
        return self.waiting.latents

    def abandon(self) -> None:
        """End a generation that nobody needs any more."""
        if self.is_alive():
            self._abandoned = True
            self._resumed.release()
            self.join()

    def forward(
        self, expert: str, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The denoiser's output, or on a step that skips the one that it gave last at this place."""
        self.expert = expert
        place, self._asked = self._asked, self._asked + 1
        if not self._skips or place >= len(self._kept):
            self._kept[place:] = [original(*args, **kwargs)]
        return self._kept[place]


class _Abandoned(BaseException):
    """Unwinds a generation that is not needed any more."""


@contextmanager
def generations(
    pipeline: Any, modules: Mapping[str, Any], calls: list[Callable[[Any], Any]]
) -> Iterator[list[Generation]]:
    """One waiting generation per call ``generate(pipeline)``; :meth:`Generation.resume` leads to its first step."""

    def watched(expert: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            generation = threading.current_thread()
            if isinstance(generation, Generation):
                return generation.forward(expert, original, *args, **kwargs)
            return original(*args, **kwargs)

        return forward

    def restore(module: Any, own: Any) -> None:
        del module.__dict__["forward"]
        if own is not None:
            module.forward = own

    started = [Generation(pipeline, call) for call in calls]
    with ExitStack() as stack:
        for expert, module in modules.items():
            stack.callback(restore, module, module.__dict__.get("forward"))
            module.forward = watched(expert, module.forward)
        for generation in started:
            stack.callback(generation.abandon)
        yield started
