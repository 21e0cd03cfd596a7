"""``calibrate report``: plots as PNG and SVG, and one self-contained ``report.html`` of a run, verified or not."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from calibrate.reporting import plots, run_plots
from calibrate.reporting.run_data import Findings, figures_table, load_findings
from calibrate.reporting.style import Drawing, as_svg, lay_out, save
from calibrate.runs.folder import write_atomically
from calibrate.text import number
from calibrate.trials.measures import MEASURES, main_measure, measured
from calibrate.trials.setting import GATE, PLAN, SHOWN
from calibrate.verifying.advice import export_line, python_lines
from coeffs import Plan


def report(folder: str | os.PathLike) -> Path:
    """Write ``report/`` in a run folder: every plot as PNG and SVG, and ``report.html``, whose path is returned.

    Raises:
        CalibrateError, CoeffsError: For a folder that is no run, or has not been fitted yet.
    """
    findings = load_findings(folder)
    target, drawings = findings.folder / "report", report_figures(findings)
    for name, drawing in drawings.items():
        lay_out(drawing)
        for suffix in ("png", "svg"):
            save(drawing, target / f"{name}.{suffix}")
    path = target / "report.html"
    write_atomically(path, render(findings, drawings).encode())
    return path


def report_figures(findings: Findings) -> dict[str, Drawing]:
    """Drawings by name; the page says where each belongs and what it shows.

    ``fit`` has the pairs and fit of the first expert's branches, residuals, signal and target in one figure.
    """
    entry, experts = findings.entry, findings.run.experts
    names: Any = {"signal": entry.signal, "target": entry.target}
    steps, prompts = entry.protocol.num_steps or "?", len(findings.run.prompts)
    title = f"{entry.label}: {prompts} prompts, {steps} steps"
    drawings: dict[str, Drawing] = {}
    for expert in experts:
        shown = findings.pairs(expert), findings.fits(expert), findings.bands(expert)
        if not drawings:
            drawings["fit"] = plots.fit_figure(*shown, title=title, **names)
        drawn = plots.fit_plots(*shown, **names)
        learning = findings.learning(expert)
        if len(learning):
            drawn["learning"] = plots.learning_curve(learning)
        prefix = f"{expert}-" if len(experts) > 1 else ""
        drawings |= {prefix + name: ax for name, ax in drawn.items()}
    verified = findings.thresholds("verified")
    drawings["replay"] = plots.replay_curve(findings.replayed, verified=verified)
    if findings.verification is not None:
        summary = findings.verification.summary
        drawings["pareto"] = run_plots.pareto(summary, measure=summary["measure"].iloc[0])
        if patterns := findings.patterns():
            drawings["patterns"] = run_plots.step_patterns(patterns)
        if samples := findings.samples(GATE) or findings.samples(PLAN):
            series = samples[0].uncached.ndim == 2
            draw = run_plots.series_grid if series else run_plots.sample_grid
            drawings["samples"] = draw(samples)
    return drawings


def render(findings: Findings, drawings: Mapping[str, Drawing]) -> str:
    """The report as one HTML page without anything to fetch; every text is escaped.

    ``drawings`` are those of :func:`report_figures`.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters |= {"number": number, "data": _data, "svg": as_svg}
    return environment.get_template("report.html.jinja").render(
        findings=findings,
        drawings=drawings,
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
        # Series are drawn as lines, see report_figures.
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
        own = [PLAN, plan.computed_steps, len(plan.schedule)]
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
