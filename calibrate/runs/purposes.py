"""What each prompt was used for: recorded, choosing or judged. A prompt that chose a plan never judges one.

Recorded prompts are those of run.yaml; the others are in ``purposes.json``. Prompts are known by their content.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from calibrate.errors import InvalidPrompts, RunFolderError
from calibrate.model.prompts import PromptSet
from calibrate.runs.files import write_json

Purposes = dict[str, str]  # of prompts, by their id
RECORDED, CHOOSING, JUDGED, AUDITED = "recorded", "choosing", "judged", "audited"


def purposes(run: Path) -> Purposes:
    """Prompt id -> ``choosing`` or ``judged``, of the prompts that were not recorded."""
    path = run / "purposes.json"
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError):
        raise RunFolderError(
            f"{path}: not readable as prompt id -> purpose; it says which prompts chose plans: put a copy back, or "
            "delete it and plan anew"
        ) from None


def note(run: Path, prompts: Iterable[str], purpose: str) -> None:
    """Remember what prompts were used for; one that chose stays one that chose."""
    known = purposes(run)
    changed = known | {prompt: purpose for prompt in prompts if known.get(prompt) != CHOOSING}
    if changed != known:
        write_json(run / "purposes.json", changed)


def for_judging(known: Purposes, prompts: Sequence[str]) -> list[str]:
    """Those of the prompts that may judge."""
    return [prompt for prompt in prompts if known.get(prompt) not in (RECORDED, CHOOSING)]


def for_choosing(known: Purposes, prompts: Sequence[str], count: int) -> list[str]:
    """Up to ``count`` prompts to choose by: those that did before, then unused ones, then judged ones."""
    order = {CHOOSING: 0, JUDGED: 2}
    free = [prompt for prompt in prompts if known.get(prompt) != RECORDED]
    return sorted(free, key=lambda prompt: order.get(known.get(prompt, ""), 1))[:count]


def held_out_prompts(known: Purposes, sets: Sequence[PromptSet], count: int) -> PromptSet:
    """Up to ``count`` prompts to judge by, of the first set that has some, whatever their seed."""
    return divided_prompts(known, sets, 0, count)[1]


def divided_prompts(
    known: Purposes, sets: Sequence[PromptSet], choosing: int, judging: int
) -> tuple[PromptSet, PromptSet]:
    """Prompts to choose by and others to judge by; where there are few, a third of them chooses."""
    for offered in sets:
        ids = [prompt.prompt_id for prompt in offered.prompts]
        free = len(set(for_choosing(known, ids, len(ids))))
        if choosing and free < choosing + judging:
            choosing = min(choosing, max(1, free // 3))
        chosen = for_choosing(known, ids, choosing)
        others = for_judging(known, [prompt for prompt in ids if prompt not in chosen])
        if others and (chosen or not choosing):
            return _selected(offered, chosen), _selected(offered, others[:judging])
    needed = "one to choose by and another to judge by" if choosing else "one to judge by"
    raise InvalidPrompts(
        f"{sets[-1].name}: every prompt of it was recorded for the fit or chose plans, or few are left ({needed}); "
        "give others with --prompts"
    )


def _selected(offered: PromptSet, ids: Sequence[str]) -> PromptSet:
    chosen = tuple(prompt for prompt in offered.prompts if prompt.prompt_id in set(ids))
    return replace(offered, prompts=chosen)
