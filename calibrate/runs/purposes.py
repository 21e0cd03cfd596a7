"""What each prompt was used for: recorded, choosing or judged. A prompt that chose a plan never judges one.

Recorded prompts are those of run.yaml; the others are in ``purposes.json``. Prompts are known by their content.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from calibrate.errors import RunFolderError
from calibrate.runs.files import write_atomically

RECORDED, CHOOSING, JUDGED = "recorded", "choosing", "judged"


def purposes(run: Path) -> dict[str, str]:
    """Prompt id -> ``choosing`` or ``judged``, of the prompts that were not recorded."""
    try:
        noted = json.loads((run / "purposes.json").read_text(encoding="utf-8"))
        return {str(prompt): str(purpose) for prompt, purpose in noted.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError):
        raise RunFolderError(
            f"{run / 'purposes.json'}: not readable as prompt id -> purpose; it says which prompts chose plans: "
            "put a copy back, or delete it and plan anew"
        ) from None


def note(run: Path, prompts: Iterable[str], purpose: str) -> None:
    """Remember what prompts were used for; one that chose stays one that chose."""
    known = purposes(run)
    changed = {**known, **{p: purpose for p in prompts if known.get(p) != CHOOSING}}
    if changed != known:
        text = json.dumps(changed, indent=1, sort_keys=True)
        write_atomically(run / "purposes.json", f"{text}\n".encode())


def for_judging(known: dict[str, str], prompts: Sequence[str]) -> list[str]:
    """Those of the prompts that may judge."""
    return [prompt for prompt in prompts if known.get(prompt) not in (RECORDED, CHOOSING)]


def for_choosing(known: dict[str, str], prompts: Sequence[str], count: int) -> list[str]:
    """Up to ``count`` prompts to choose by: those that did before, then unused ones, then judged ones."""
    order = {CHOOSING: 0, JUDGED: 2}
    free = [prompt for prompt in prompts if known.get(prompt) != RECORDED]
    return sorted(free, key=lambda prompt: order.get(known.get(prompt, ""), 1))[:count]
