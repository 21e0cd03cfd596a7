"""What makes an entry fit to be released: rules beyond the schema, each with the way to satisfy it."""

import re
from dataclasses import dataclass

from coeffs.engines.setting import falling_ranges, negative_ranges
from coeffs.entry.schema import Candidate, Entry

_MACHINE_PATH = re.compile(r"(?:^|[\s=\"'])(?:/(?:home|root|Users|tmp|mnt|work)/|[A-Za-z]:\\|~/)")
_HELD_OUT = ("r2_held_out", "rmse_held_out")


@dataclass(frozen=True)
class Problem:
    """One finding; ``fatal`` ones forbid the release."""

    text: str
    fatal: bool

    def __str__(self) -> str:
        return f"{'error' if self.fatal else 'warning'}: {self.text}"


def entry_problems(entry: Entry) -> list[Problem]:
    """Problems of one entry, fatal ones first. Published and copied sets are only held to what they can state."""
    found = [Problem(f"a machine's path in {name}: remove it", True) for name in _paths(entry)]
    for name, expert in entry.experts.items():
        for branch, fit in expert.branches.items():
            found += _fit_problems(f"{name}/{branch}", fit, entry)
    if entry.status == "measured":
        found += _measured_problems(entry)
    return sorted(found, key=lambda problem: not problem.fatal)


def _measured_problems(entry: Entry) -> list[Problem]:
    required = {
        "source.run_id": entry.source.run_id,
        "source.log_sha256": entry.source.log_sha256,
        "transformer_class": entry.transformer_class,
        "protocol.num_steps": entry.protocol.num_steps,
    }
    found = [Problem(f"{name} is missing: draft the entry with `calibrate fit RUN`", True)
             for name, value in required.items() if value is None]  # fmt: skip
    if not any(expert.branches or expert.mag_ratios for expert in entry.experts.values()):
        found.append(Problem("no coefficients and no mag_ratios", True))
    if not entry.thresholds:
        found.append(
            Problem("no thresholds: nobody can tell what the coefficients are worth", True)
        )
    elif not any(row.kind == "verified" for row in entry.thresholds):
        found.append(Problem("no verified threshold: run `calibrate verify`", False))
    return found


def _fit_problems(name: str, fit: Candidate, entry: Entry) -> list[Problem]:
    found = []
    polynomial = fit.polynomial()
    measured = entry.status == "measured"
    if fit.domain is None:
        return [Problem(f"{name}: no domain", measured)]
    negative = negative_ranges(polynomial, fit.domain)
    if negative:
        low, high = negative[0]
        text = f"{name}: negative on its domain (x {low:.3g} to {high:.3g}), so that engines' sign rules disagree"
        found.append(
            Problem(
                f"{text}: fit with `calibrate fit RUN --constrained`" if measured else text,
                measured,
            )
        )
    if falling := falling_ranges(polynomial, fit.domain):
        low, high = falling[0]
        found.append(Problem(f"{name}: falls with x from {low:.3g} to {high:.3g}", False))
    if measured:
        if fit.counts is None or not fit.counts.pairs:
            found.append(Problem(f"{name}: no count of pairs", True))
        if all((fit.figures or {}).get(figure) is None for figure in _HELD_OUT):
            found.append(Problem(f"{name}: no held-out figure (needs at least two prompts)", True))
    return found


def _paths(entry: Entry) -> list[str]:
    source = {f"source.{name}": value for name, value in vars(entry.source).items()}
    texts = {**source, "notes": entry.notes, "checkpoint.repository": entry.checkpoint.repository}
    texts |= {f"warnings[{place}]": text for place, text in enumerate(entry.warnings)}
    arguments = entry.protocol.call_arguments.items()
    texts |= {f"protocol.call_arguments.{name}": value for name, value in arguments}
    return [
        name for name, text in texts.items() if isinstance(text, str) and _MACHINE_PATH.search(text)
    ]
