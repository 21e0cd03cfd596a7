"""The stored rows as the tables of docs/performance.md."""

from typing import Any

from benchmarks.study import difference_at, level_at

Rows = dict[str, dict[str, Any]]


def markdown(rows: Rows) -> str:
    """One table a kind of case, and the failures."""
    parts = []
    for kind, build in TABLES.items():
        lines = [
            build(row["title"], row["figures"])
            for name, row in rows.items()
            if name.startswith(f"{kind}/") and "figures" in row
        ]
        flat = [line for group in lines for line in group]
        if flat:
            parts.append(f"## {kind.capitalize()}\n\n" + _table(HEADERS[kind], flat))
    failed = [f"- {name}: {row['failed']}" for name, row in rows.items() if "failed" in row]
    if failed:
        parts.append("## Failed\n\n" + "\n".join(failed))
    return "\n\n".join(parts)


HEADERS = {
    "applying": (
        "model",
        "case",
        "time / plain",
        "share of ideal",
        "host waits",
        "peak GiB",
    ),
    "recording": ("model", "case", "time / plain", "peak GiB"),
    "verify": ("model", "figure", "seconds a prompt"),
    "measures": ("image", "measure", "ms"),
    "compiling": ("model", "case", "time / eager"),
    "planning": ("model", "policy", "computed", "PSNR, mean (worst)", "minus fewer steps"),
}


def _applying(title: str, figures: dict[str, Any]) -> list[tuple]:
    lines = [
        (
            title,
            case,
            _ratio(value),
            _number(figures["share_of_ideal"].get(case), "{:.0%}"),
            _number(figures["host_waits"].get(case), "{}"),
            _gibibytes(figures["peak_bytes"][case]),
        )
        for case, value in figures["over_plain"].items()
    ]
    for part, value in figures["milliseconds_a_call"].items():
        lines.append((title, f"{part}, ms a call", f"{value:.3f}", "", "", ""))
    lines.append(
        (
            title,
            "ideal speed-up at half skipped",
            f"{figures['ideal_speedup']:.3f}",
            "",
            "",
            "",
        )
    )
    return lines


def _recording(title: str, figures: dict[str, Any]) -> list[tuple]:
    return [
        (title, case, _ratio(value), _gibibytes(figures["peak_bytes"][case]))
        for case, value in figures["over_plain"].items()
    ]


def _verify(title: str, figures: dict[str, Any]) -> list[tuple]:
    model = f"tiny-longcat-image, {figures['steps']} steps"
    names = ("record_seconds_a_prompt", "verify_seconds_a_prompt")
    return [(model, name.partition("_")[0], f"{figures[name]:.2f}") for name in names]


def _measures(title: str, figures: dict[str, Any]) -> list[tuple]:
    return [(title, name, f"{value:.1f}") for name, value in figures["milliseconds"].items()]


def _compiling(title: str, figures: dict[str, Any]) -> list[tuple]:
    return [(title, case, _ratio(value)) for case, value in figures["over_eager"].items()]


def _planning(title: str, figures: dict[str, Any]) -> list[tuple]:
    level, difference = level_at(figures), difference_at(figures)
    chosen = dict.fromkeys((row["policy"], row["budget"]) for row in figures["rows"])
    steps = figures["steps"]
    return [
        (
            title,
            policy,
            f"{budget} of {steps}",
            level(policy, budget),
            difference(policy, budget),
        )
        for policy, budget in chosen
    ]


TABLES = {
    "applying": _applying,
    "recording": _recording,
    "verify": _verify,
    "measures": _measures,
    "compiling": _compiling,
    "planning": _planning,
}


def _ratio(value: dict[str, float]) -> str:
    return f"{value['median']:.3f} ({value['lowest']:.3f} to {value['highest']:.3f})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _gibibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**30:.2f}"


def _table(header: tuple, lines: list[tuple]) -> str:
    rows = [header, ("---",) * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
