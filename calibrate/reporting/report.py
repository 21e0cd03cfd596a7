"""``calibrate report``: plots as PNG and SVG, and one self-contained ``report.html`` of a run, verified or not."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from calibrate.reporting import plots, run_plots
from calibrate.reporting.run_data import Findings, figures_table, load_findings
from calibrate.reporting.style import Drawing, as_svg, save
from calibrate.runs.folder import write_atomically
from calibrate.text import number
from calibrate.trials.measures import MEASURES, main_measure, measured
from calibrate.trials.setting import GATE, PLAN, SHOWN
from calibrate.verifying.advice import export_line, python_lines
from coeffs import Plan


@dataclass(frozen=True)
class Picture:
    """A plot of the report, with its section, title (what a screen reader says) and caption."""

    drawing: Drawing
    section: str
    title: str
    caption: str

    def __html__(self) -> str:
        caption = Markup("<figcaption>{}</figcaption>").format(self.caption)
        return f"<figure>{as_svg(self.drawing, self.title)}{caption}</figure>"


def report(folder: str | os.PathLike) -> Path:
    """Write ``report/`` in a run folder: every plot as PNG and SVG, and ``report.html``, whose path is returned.

    Raises:
        CalibrateError, CoeffsError: For a folder that is no run, or has not been fitted yet.
    """
    findings = load_findings(folder)
    target, pictures = findings.folder / "report", report_figures(findings)
    drawings = {name: picture.drawing for name, picture in pictures.items()}
    for name, drawing in ({"fit": fit_picture(findings)} | drawings).items():
        for suffix in ("png", "svg"):
            save(drawing, target / f"{name}.{suffix}")
    path = target / "report.html"
    write_atomically(path, render(findings, pictures).encode())
    return path


def fit_picture(findings: Findings) -> Figure:
    """``fit.png``: pairs and fit per branch, residuals, signal and target over sigma."""
    entry = findings.entry
    steps = entry.protocol.num_steps or "?"
    title = f"{entry.label}: {len(findings.run.prompts)} prompts, {steps} steps"
    shown = findings.pairs(), findings.fits(), findings.bands()
    return plots.fit_figure(*shown, signal=entry.signal, target=entry.target, title=title)


def report_figures(findings: Findings) -> dict[str, Picture]:
    """Name -> picture, in the order of the report."""
    pictures: dict[str, Picture] = {}
    experts = findings.run.experts
    for expert in experts:
        prefix = f"{expert}-" if len(experts) > 1 else ""
        pictures |= {prefix + name: shown for name, shown in _fit_pictures(findings, expert)}
    pictures["replay"] = Picture(
        plots.replay_curve(findings.replayed, verified=findings.thresholds("verified")),
        "thresholds",
        "Computed steps over the threshold",
        "From the recorded signals alone; skipping itself is assumed not to change them.",
    )
    return pictures | dict(_run_pictures(findings))


def _fit_pictures(findings: Findings, expert: str) -> Iterator[tuple[str, Picture]]:
    signal, target = findings.entry.signal, findings.entry.target
    pairs, fits = findings.pairs(expert), findings.fits(expert)
    bands = findings.bands(expert)
    for branch, polynomial in fits.items():
        title, own = f"{branch}: pairs and fit", pairs[pairs["branch"] == branch]
        drawing = plots.pairs_with_fit(
            own, {branch: polynomial}, bands, signal=signal, target=target, title=title
        )
        caption = "Each point is one step of one prompt. The line is the fit, with its 95 % interval."
        yield f"pairs-{branch}", Picture(drawing, "fit", title, caption)
    yield (
        "residuals",
        Picture(
            plots.residuals(pairs, fits),
            "fit",
            "What the fit leaves over",
            "A line away from zero: the schedule explains something that x does not.",
        ),
    )
    for name, column, label in (
        ("signal", "x", plots.SIGNAL_LABELS[signal]),
        ("target", "y", plots.TARGET_LABELS[target]),
    ):
        title = f"{name.capitalize()} over the schedule"
        drawing = plots.over_sigma(pairs, column, label=label, title=title)
        caption = "Median over prompts and the range from 10 to 90 %."
        caption += findings.coinciding(column, expert)
        yield name, Picture(drawing, "fit", title, caption)
    learning = findings.learning(expert)
    if len(learning):
        yield (
            "learning",
            Picture(
                plots.learning_curve(learning),
                "fit",
                "Held-out error over the number of prompts",
                "Error on prompts that were left out, over the number of prompts fitted (10 to 90 % of draws).",
            ),
        )


def _run_pictures(findings: Findings) -> Iterator[tuple[str, Picture]]:
    """What real runs gave."""
    if findings.verification is None:
        return
    summary = findings.verification.summary
    yield (
        "pareto",
        Picture(
            run_plots.pareto(summary, measure=summary["measure"].iloc[0]),
            "runs",
            "Quality over computed steps",
            "Held-out prompts, same seeds: compare points above the same number of computed steps, drawn a little "
            "apart. One colour per kind of policy, grey for other rules and caches; the best come first.",
        ),
    )
    if patterns := findings.patterns():
        yield (
            "patterns",
            Picture(
                run_plots.step_patterns(patterns),
                "thresholds",
                "Computed steps by threshold",
                "The first held-out prompt: what the replay foresaw and what the real run did, per threshold.",
            ),
        )
    for policy in (GATE, PLAN):
        if samples := findings.samples(policy):
            series = samples[0].uncached.ndim == 2
            drawing = (run_plots.series_grid if series else run_plots.sample_grid)(samples)
            caption = f"Held-out samples of the {policy}."
            yield "samples", Picture(drawing, "files", f"Samples of the {policy}", caption)
            return


def render(findings: Findings, pictures: Mapping[str, Picture]) -> str:
    """The report as one HTML page without anything to fetch; every text is escaped.

    ``pictures`` are those of :func:`report_figures`.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters |= {"number": number, "data": _data}
    return environment.get_template("report.html.jinja").render(
        findings=findings,
        pictures=pictures.values(),
        fits=figures_table(findings.entry),
        plans=[_plan(findings, plan) for plan in findings.entry.plans or ()],
        **_advised(findings),
    )


def _advised(findings: Findings) -> dict[str, Any]:
    """How the advice is followed, the measures of the runs behind it, and by policy the samples to look at."""
    advice = findings.advice
    if advice is None:
        return {"images": {}}
    deployed, results = (findings.entry, findings.folder), findings.results
    main, images = MEASURES[main_measure(results)], {}
    for policy in dict.fromkeys((advice.policy or SHOWN[0], *SHOWN)):
        samples = findings.samples(policy, advice.budget or None)
        # Series are drawn as lines, see _run_pictures.
        if samples and samples[0].uncached.ndim == 3:
            images[policy] = samples
    return {
        "python": python_lines(advice, *deployed),
        "export": export_line(advice, *deployed),
        "measure": main,
        "others": [measure for measure in measured(results) if measure is not main],
        "images": images,
    }


def _finalize(value: Any) -> Any:
    """What is printed of a value: nothing as a dash, and no line break before a percent sign."""
    if value is None:
        return "–"
    if isinstance(value, str) and not isinstance(value, Markup):
        return value.replace(" %", "\u00a0%")
    return value


def _plan(findings: Findings, plan: Plan) -> dict[str, Any]:
    """A plan with what was measured of it, by verification where it took part, else by the planner."""
    if findings.verification is not None:
        summary = findings.verification.summary
        own = (PLAN, plan.computed_steps, len(plan.schedule))
        rows = summary[(summary[["policy", "budget", "num_steps"]] == own).all(axis=1)]
        for row in rows.to_dict("records"):
            return row | {"plan": plan, "by": "verification", "quality": row[row["measure"]]}
    known = plan.figures or {}
    in_db = (name for name in MEASURES if MEASURES[name].unit == "dB" and name in known)
    measure = next(in_db, "")
    return {
        "plan": plan,
        "by": "planner",
        "quality": known.get(measure),
        "worst": known.get(f"worst_{measure}"),
        "speedup": known.get("speedup"),
        "prompts": known.get("prompts"),
    }


def _data(image: np.ndarray) -> str:
    """An image, to the last bit of 8, as a URL that holds it."""
    pixels = np.round(255 * np.clip(image[..., :3], 0, 1)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
