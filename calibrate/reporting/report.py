"""``calibrate report``: plots as PNG and SVG, and one self-contained ``report.html`` of a run, verified or not."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calibrate.reporting import plots
from calibrate.reporting.run_data import Findings, figures_table, load_findings
from calibrate.reporting.style import BLUE, as_svg, save
from calibrate.runs.folder import write_atomically
from calibrate.verifying.comparison import Comparison

Picture = Figure | Axes
OTHER_SECTIONS = (
    "replay",
    "pareto",
    "patterns",
    "samples",
)  # figures outside the section on the fit


def report(folder: str | os.PathLike) -> Path:
    """Write ``report/`` in a run folder: every plot as PNG and SVG, and ``report.html``, whose path is returned.

    Raises:
        CalibrateError, CoeffsError: For a folder that is no run, or has not been fitted yet.
    """
    findings = load_findings(folder)
    target, figures = findings.folder / "report", report_figures(findings)
    for name, picture in [
        ("fit", fit_picture(findings)),
        *((name, picture) for name, (picture, _) in figures.items()),
    ]:
        save(picture, target / f"{name}.png")
        save(picture, target / f"{name}.svg")
    path = target / "report.html"
    write_atomically(path, render(findings, figures).encode())
    return path


def fit_picture(findings: Findings, expert: str = "transformer") -> Figure:
    """``fit.png``: pairs and fit per branch, residuals, signal and target over sigma."""
    entry, run = findings.entry, findings.run
    steps = findings.entry.protocol.num_steps or "?"
    title = f"{entry.label}: {len(run.prompts)} prompts, {steps} steps"
    return plots.fit_figure(
        findings.pairs(expert), findings.fits(expert), findings.bands(expert),
        signal=entry.signal, target=entry.target, title=title,
    )  # fmt: skip


def render(findings: Findings, pictures: dict[str, tuple[Picture, str]]) -> str:
    """The report as one HTML page without anything to fetch; every text is escaped.

    ``pictures`` are those of :func:`report_figures`.
    """
    figures = {name: _figure(picture, caption) for name, (picture, caption) in pictures.items()}
    parts = [
        _head(findings),
        _tiles(findings),
        _fit_section(findings, figures),
        _threshold_section(findings, figures),
        _verification_section(findings, figures),
        _warnings_section(findings),
        _origin_section(findings),
    ]
    page = Template(
        (files("calibrate.reporting") / "report_template.html").read_text(encoding="utf-8")
    )
    return page.substitute(
        title=escape(f"{findings.entry.label} - calibration"), body="\n".join(filter(None, parts))
    )


# --- figures --------------------------------------------------------------------------------------------------------


def report_figures(findings: Findings) -> dict[str, tuple[Picture, str]]:
    """Name -> picture and caption, in the order of the report."""
    entry, found = findings.entry, {}
    for expert in findings.run.experts:
        prefix = f"{expert}-" if len(findings.run.experts) > 1 else ""
        pairs, fits, bands = findings.pairs(expert), findings.fits(expert), findings.bands(expert)
        for branch in findings.run.branches(expert):
            name = branch if branch in fits else entry.experts[expert].recommended
            own = pairs[pairs["branch"] == branch].assign(branch=name)
            band = {name: bands[name]} if name in bands else None
            found[f"{prefix}pairs-{branch}"] = (
                plots.pairs_with_fit(
                    own, {name: fits[name]}, band, signal=entry.signal, target=entry.target,
                    title=f"{prefix}{branch}: pairs and fit",
                ),
                "Each point is one step of one prompt. The line is the fit over its domain, with its 95 % interval.",
            )  # fmt: skip
        found[f"{prefix}residuals"] = (
            plots.residuals(pairs, fits),
            "A line away from zero: the schedule explains something that x does not.",
        )
        found[f"{prefix}signal"] = (
            plots.over_sigma(
                pairs,
                "x",
                label=plots.SIGNAL_LABELS[entry.signal],
                title="Signal over the schedule",
            ),
            "Median over prompts and the range from 10 to 90 %.",
        )
        found[f"{prefix}target"] = (
            plots.over_sigma(
                pairs,
                "y",
                label=plots.TARGET_LABELS[entry.target],
                title="Target over the schedule",
            ),
            "What is predicted, over the schedule.",
        )
        learning = findings.learning(expert)
        if len(learning):
            caption = "Error on prompts that were left out, over the number of prompts fitted (10 to 90 % of draws)."
            found[f"{prefix}learning"] = (plots.learning_curve(learning), caption)
    verified = findings.thresholds("verified")
    found["replay"] = (
        plots.replay_curve(findings.replayed, verified=verified),
        "From the recorded signals alone; skipping itself is assumed not to change them.",
    )
    if findings.verification is not None:
        measure = findings.verification.summary["measure"].iloc[0]
        found["pareto"] = (
            plots.pareto(findings.verification.summary, measure=measure),
            "Held-out prompts, same seeds: compare points above the same number of computed steps, drawn a little "
            "apart. One colour per kind of policy, grey for other rules and caches; the best come first.",
        )
        patterns = findings.patterns()
        if patterns:
            caption = "The first held-out prompt: what the replay foresaw and what the real run did, per threshold."
            found["patterns"] = (plots.step_patterns(patterns), caption)
        samples = findings.samples()
        if samples:
            caption = "Held-out samples of the fitted gate at the middle budget."
            found["samples"] = (plots.sample_grid(samples), caption)
    return found


def _figure(picture: Picture, caption: str) -> str:
    svg = as_svg(picture)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    svg = svg.replace(BLUE.lower(), "var(--blue)")  # too dim on a dark page, which brightens it
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


# --- sections -------------------------------------------------------------------------------------------------------


def _head(findings: Findings) -> str:
    entry = findings.entry
    lines = [f"<h1>{escape(entry.title or entry.label)}</h1>"]
    lines.append(
        f'<p class="sub">Step-cache calibration {escape(entry.label)}, {escape(_protocol(findings))}</p>'
    )
    found = []
    found += [f"<p><strong>{escape(line)}</strong></p>" for line in findings.first_lines]
    for expert in findings.run.experts:
        name = f"Fit of {expert}" if len(findings.run.experts) > 1 else "Fit"
        found.append(f"<p>{escape(name)}: {escape(findings.fit_headline(expert))}</p>")
    if findings.verification is None:
        text = (
            "Verified elsewhere: the entry has verified thresholds, but their runs are not in this folder."
            if len(findings.thresholds("verified"))
            else "Not verified: no cached run has been compared with an uncached one yet (calibrate verify)."
        )
        found.append(f"<p>{escape(text)}</p>")
    lines.append(f'<div class="findings">{"".join(found)}</div>')
    if findings.embedded:
        text = "Embedded tiny model: these figures show that the tool works, and say nothing about any other model."
        lines.append(f'<div class="findings warning"><p>{escape(text)}</p></div>')
    return "\n".join(lines)


def _protocol(findings: Findings) -> str:
    protocol = findings.entry.protocol
    parts = [f"{protocol.num_steps} steps" if protocol.num_steps else ""]
    if protocol.width and protocol.height:
        parts.append(f"{protocol.width} × {protocol.height} pixels")
    parts += [f"{protocol.num_frames} frames" if protocol.num_frames else ""]
    parts += [
        f"guidance {protocol.guidance_scale:g}" if protocol.guidance_scale is not None else ""
    ]
    parts += [str(part) for part in (protocol.dtype, protocol.scheduler) if part]
    return ", ".join(filter(None, parts))


def _tiles(findings: Findings) -> str:
    run, verified = findings.run, findings.thresholds("verified")
    tiles = [(f"{len(run.prompts)}", "prompts fitted"), (f"{len(run.frame):,}", "pairs")]
    expert = run.experts[0]
    figures = findings.entry.fit(expert, run.branches(expert)[0]).figures or {}
    if figures.get("r2_held_out") is not None:
        tiles.append((f"{figures['r2_held_out']:.2f}", f"held-out R², {run.branches(expert)[0]}"))
    if len(verified):
        middle = verified.iloc[len(verified) // 2]
        tiles.append(
            (f"{middle['speedup']:.2f}×", f"verified at threshold {middle['threshold']:.3g}")
        )
        if middle["psnr_db"] is not None and np.isfinite(middle["psnr_db"]):
            tiles.append((f"{middle['psnr_db']:.1f} dB", "PSNR there, against uncached"))
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in tiles
    ) + "</div>"  # fmt: skip


def _fit_section(findings: Findings, figures: dict[str, str]) -> str:
    several = len(findings.run.experts) > 1
    rows = [
        [
            (f"{row.expert} " if several else "") + row.branch + (" *" if row.recommended else ""),
            row.pairs, row.fit, _round(row.r2, 2), _round(row.r2_held_out, 2), _round(row.rmse_held_out, 4),
            _round(row.rmse_constant, 4), _round(row.rmse_step_mean, 4), _round(row.spearman_within_step, 2),
        ]
        for row in figures_table(findings.entry).itertuples()
    ]  # fmt: skip
    header = [
        "branch", "pairs", "fit", "R²", "held-out R²", "held-out RMSE", "of a constant", "of the step's mean",
        "rank within step",
    ]  # fmt: skip
    drawn = [html for name, html in figures.items() if name not in OTHER_SECTIONS]
    why = findings.entry.fit(findings.run.experts[0]).why
    return "\n".join((
        "<h2>Fit</h2>",
        "<p>Held-out figures leave whole prompts out. A fit is worth having where its held-out error lies below the "
        "one of a constant (uniform skipping) and of the step's mean (a fixed plan).</p>",
        _table(header, rows),
        f'<p class="note">* for engines with a single slot. Why this fit: {escape(why or "not stated")}.</p>',
        '<div class="figures">', *drawn, "</div>",
    ))  # fmt: skip


def _threshold_section(findings: Findings, figures: dict[str, str]) -> str:
    rows = [
        [_round(row.threshold, 4), f"{row.computed_steps:.1f} of {row.num_steps}", row.kind, _round(row.speedup, 2),
         _round(row.psnr_db, 1), _round(row.worst_psnr_db, 1), _round(row.ssim, 3), _round(row.latent_rel_l2, 3)]
        for row in sorted(findings.entry.thresholds, key=lambda row: row.kind != "verified")
        if row.computed_steps is not None
    ]  # fmt: skip
    header = [
        "threshold",
        "computed",
        "from",
        "speed-up",
        "PSNR (dB)",
        "worst (dB)",
        "SSIM",
        "latent error",
    ]
    return "\n".join((
        "<h2>Thresholds</h2>",
        "<p>A threshold means nothing without this entry's coefficients. "
        "<em>replay</em>: decided from the log; <em>verified</em>: real cached runs on held-out prompts.</p>",
        _table(header, rows),
        '<div class="figures">', figures["replay"], figures.get("patterns", ""), "</div>",
    ))  # fmt: skip


def _verification_section(findings: Findings, figures: dict[str, str]) -> str:
    found = findings.verification
    if found is None:
        return ""
    facts, summary = found.facts, found.summary
    measure = summary["measure"].iloc[0]
    label = plots.MEASURE_LABELS[measure].split(" against")[0]
    rows = [
        [row["policy"], f"{row['computed_steps']:.1f}", _round(row["threshold"], 4), _round(row["speedup"], 2),
         _interval(row, measure, 1), _round(row.get("worst"), 1), _round(row.get("ssim"), 3),
         _round(row.get("ms_ssim"), 3), _round(row.get("latent_rel_l2"), 3)]
        for row in summary.to_dict("records")
    ]  # fmt: skip
    quality = f"{label}, dB (95 % interval)"
    header = [
        "policy",
        "computed",
        "threshold",
        "speed-up",
        quality,
        "worst",
        "SSIM",
        "MS-SSIM",
        "latent error",
    ]
    floor, drift = facts["floor"], facts["drift"]
    noise = (
        "Two uncached runs are bit-identical." if floor["identical"] else
        f"Two uncached runs differ by themselves: {_round(floor['worst_psnr_db'], 1)} dB at worst."
    )  # fmt: skip
    drifted = (
        ""
        if drift is None
        else (
            f"Replay and real runs decide {drift['disagreeing_steps']:.1f} of {facts['num_steps']} steps differently "
            f"(mean; at most {drift['most_disagreeing_steps']:.0f}), replayed less real computed steps: "
            f"{drift['replayed_minus_real_steps']:+.1f}."
        )
    )
    broken = [f"{name} ({count} samples)" for name, count in facts.get("broken", {}).items()]
    refused = [
        f"<li><b>{escape(name)}</b>: {escape(reason)}</li>"
        for name, reason in facts["refused"].items()
    ]
    measures = "; ".join(facts["measures"].values())
    return "\n".join((
        "<h2>Verification</h2>",
        f"<p>{len(facts['prompts'])} held-out prompts of {escape(facts['prompt_set'])}, same seeds, on "
        f"{escape(facts['device'])}; {facts['uncached_seconds']:.2f} s uncached. {escape(noise)} "
        f"{escape(drifted)}</p>",
        '<div class="figures">', figures["pareto"], figures.get("samples", ""), "</div>",
        _comparisons(findings.plan_comparisons),
        _comparisons(findings.comparisons),
        f"<details><summary>All figures</summary>{_table(header, rows)}</details>",
        f"<p><strong>NaN or infinity: {escape(', '.join(broken))}; in no mean.</strong></p>" if broken else "",
        f"<p>Refused by this model:</p><ul>{''.join(refused)}</ul>" if refused else "",
        f'<p class="note">Speed-up: wall time of the whole pipeline call, uncached over cached. {escape(measures)}. '
        "Data range 1.</p>",
    ))  # fmt: skip


def _comparisons(comparisons: Sequence[Comparison]) -> str:
    """One policy against every other one, as a table; nothing without comparisons."""
    if not comparisons:
        return ""
    words = {"better": "it is better", "worse": "it is worse", "undecided": "no difference shown"}
    rows = [
        [one.baseline, f"{one.difference:+.1f} dB", f"{one.low:+.1f} to {one.high:+.1f}",
         words.get(one.outcome, "too few prompts")]
        for one in sorted(comparisons, key=lambda one: one.difference)
    ]  # fmt: skip
    first = comparisons[0]
    return "\n".join((
        f"<p>The {escape(first.policy)} against every other policy at its own computed steps, paired over "
        f"{first.prompts} prompts (positive: the {escape(first.policy)} is better):</p>",
        _table(["against", "difference", "95 % interval", f"the {first.policy}"], rows),
    ))  # fmt: skip


def _warnings_section(findings: Findings) -> str:
    warnings = findings.entry.warnings
    if not warnings:
        return ""
    return (
        "<h2>Warnings</h2><ul>" + "".join(f"<li>{escape(text)}</li>" for text in warnings) + "</ul>"
    )


def _origin_section(findings: Findings) -> str:
    entry, source = findings.entry, findings.entry.source
    facts = {
        "checkpoint": " ".join(
            filter(None, (entry.checkpoint.repository, entry.checkpoint.revision))
        ),
        "weights, SHA-256": entry.checkpoint.sha256,
        "classes": " ".join(filter(None, (entry.pipeline_class, entry.transformer_class))),
        "signal and target": f"{entry.signal} → {entry.target}, sign rule {entry.sign_rule}",
        "run": source.run_id,
        "log, SHA-256": source.log_sha256,
        "made with": f"teacal {source.toolkit}, torch {source.torch}, diffusers {source.diffusers}",
        "device": source.device,
        "command": source.command,
        "created": source.created,
    }
    coefficients = {
        f"{expert} {branch}": f"[{', '.join(f'{value:.9g}' for value in fit.coefficients_high_to_low)}]"
        for expert, found in entry.experts.items()
        for branch, fit in found.branches.items()
    }
    return "\n".join((
        "<h2>Coefficients</h2>", "<p>Highest power first, numpy.polyfit's order.</p>", _definitions(coefficients),
        "<h2>Origin</h2>", _definitions(facts),
    ))  # fmt: skip


# --- small things ---------------------------------------------------------------------------------------------------


def escape(text: str) -> str:
    """Safe in HTML; numbers stay with their percent sign."""
    return html.escape(text).replace(" %", "\u00a0%")


def _definitions(facts: dict[str, Any]) -> str:
    rows = [
        f"<dt>{escape(name)}</dt><dd><code>{escape(str(value))}</code></dd>"
        for name, value in facts.items()
        if value
    ]
    return f"<dl>{''.join(rows)}</dl>"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = [
        "".join(f"<td>{escape('–' if cell is None else str(cell))}</td>" for cell in row)
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _round(value: float | None, digits: int) -> str | None:
    return None if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def _interval(row: dict[str, Any], measure: str, digits: int) -> str | None:
    mean, low, high = (
        _round(row.get(key), digits) for key in (measure, f"{measure}_low", f"{measure}_high")
    )
    return mean if mean is None or low is None else f"{mean} ({low} to {high})"
