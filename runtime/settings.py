"""Where the polynomials of a gate come from: an entry that fits the model, or coefficients of the caller's own."""

from dataclasses import dataclass
from typing import Any

from torch import nn

import coeffs
from coeffs.entry.polynomial import Polynomial
from coeffs.errors import EntryMismatch
from coeffs.match import compare
from runtime.errors import InvalidSetting
from runtime.facts import class_name, facts_of

SIGNALS = ("modulated_input", "time_embedding")


@dataclass(frozen=True)
class Source:
    """Where the polynomials come from: an entry, or coefficients of the caller's own."""

    entry: "coeffs.Entry | None"
    own: Polynomial | None
    signal: str
    mismatches: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, entry, coefficients, domain, sign_rule, signal, target, modules, strict
    ) -> "Source":
        if coefficients is not None:
            if entry is not None:
                raise InvalidSetting("entry and coefficients given: expected one of them")
            own = Polynomial(tuple(coefficients), domain, sign_rule or "clamp")
            return cls(None, own, _checked_signal(signal or "modulated_input"))
        _refuse_with_entry(domain=domain, sign_rule=sign_rule, signal=signal)
        found = loaded(entry) if entry is not None else _entry_for(target, modules, strict)
        classes = {class_name(module) for module in modules.values()}
        if (
            entry is not None
            and found.transformer_class
            and found.transformer_class.split()[0] not in classes
        ):
            raise InvalidSetting(
                f"{found.label} is for {found.transformer_class}, this model is {', '.join(sorted(classes))}: "
                "use an entry for this class, or pass its numbers as coefficients=[...] if you mean to"
            )
        differences = tuple(map(str, compare(found, facts_of(target, modules))[0]))
        if strict and differences:
            raise EntryMismatch(
                f"{found.label} was not measured like this: {'; '.join(differences)}; leave strict out"
            )
        return cls(found, None, _checked_signal(found.signal), differences)

    @property
    def label(self) -> str | None:
        return None if self.entry is None else self.entry.label

    def field(self, name: str) -> Any:
        return getattr(self.entry, name, None)

    def polynomial(self, expert: str, branch: str) -> Polynomial:
        """The polynomial of a branch of an expert: its own where the entry has one, else the recommended one."""
        return self.own or self.entry.fit(expert, branch).polynomial(self.entry.sign_rule)


def _entry_for(target: Any, modules: dict[str, nn.Module], strict: bool) -> "coeffs.Entry":
    return coeffs.find(facts_of(target, modules), strict=strict).entry


def loaded(entry: "coeffs.Entry | str") -> "coeffs.Entry":
    return entry if isinstance(entry, coeffs.Entry) else coeffs.load(entry)


def _refuse_with_entry(**settings: Any) -> None:
    for name, value in settings.items():
        if value is not None:
            raise InvalidSetting(f"{name}= belongs to coefficients=; an entry brings its own")


def _checked_signal(signal: str) -> str:
    if signal not in SIGNALS:
        raise InvalidSetting(
            f"signal {signal!r}: the runtime can watch {' or '.join(SIGNALS)}; use another entry"
        )
    return signal
