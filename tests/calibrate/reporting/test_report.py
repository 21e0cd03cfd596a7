"""The report says what was found, escapes what it is told, fetches nothing, and needs no verification."""

import dataclasses
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

import coeffs
from calibrate.cli import cli
from calibrate.reporting import plots
from calibrate.reporting.report import render, report, report_figures
from calibrate.reporting.run_data import example_run, load_findings
from calibrate.verifying.lineup import FEWER_STEPS, GATE, PLAN
from calibrate.verifying.results import load_verification, write_verification

FIGURES = {
    "fit",
    "pairs-cond",
    "pairs-uncond",
    "residuals",
    "signal",
    "target",
    "learning",
    "replay",
    "pareto",
    "patterns",
}
VOID = {"meta", "br", "img", "path", "use", "image", "rect", "link"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(example_run(), folder)
    return folder


@pytest.fixture(scope="module")
def page(run):
    return report(run).read_text(encoding="utf-8")


class _Balance(HTMLParser):
    """Raises on a tag that is closed in the wrong place."""

    def __init__(self):
        super().__init__()
        self.open, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_all_plots_are_written_as_png_and_svg(run, page):
    for suffix in ("png", "svg"):
        assert {path.stem for path in (run / "report").glob(f"*.{suffix}")} >= FIGURES | {"samples"}


def test_the_first_lines_say_what_was_found(run, page):
    found = load_findings(run)
    body = page[page.index("<main>") :]
    places = [body.index(line.split(" (")[0]) for line in found.first_lines]
    assert found.verification.headline in found.first_lines
    assert places == sorted(places) and 0 < places[0] < 500 and places[-1] < 2000
    assert "on unseen prompts" in body[:3000]


@pytest.fixture(scope="module")
def beaten(run, tmp_path_factory):
    """The run with a plan that took part: fewer steps is better by 2 dB at its first budget, worse at the others."""
    folder = tmp_path_factory.mktemp("report") / "beaten"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("report"))
    found = load_verification(folder)
    plan = found.results[found.results["policy"] == FEWER_STEPS].assign(policy=PLAN)
    plan["psnr_db"] += np.where(plan["budget"] == plan["budget"].max(), -2.0, 3.0)
    write_verification(
        dataclasses.replace(found, results=pd.concat([found.results, plan], ignore_index=True))
    )
    return folder


def test_where_fewer_steps_is_better_the_first_line_says_so_with_figures(beaten):
    found = load_findings(beaten)
    page = render(found, {"replay": (plots.curves({}), ""), "pareto": (plots.curves({}), "")})
    body = re.sub(r"<[^>]*>", "", page[page.index('<div class="findings">') :]).replace("\xa0", " ")
    line = found.first_lines[0]
    assert body.startswith(line)
    rows = (
        found.verification.results.query("budget == budget.max()")
        .groupby("policy")["psnr_db"]
        .mean()
    )
    assert line.startswith("Fewer steps is better than the plan at ")
    assert (
        f"({rows[FEWER_STEPS]:.1f} against {rows[PLAN]:.1f} dB, +2.0, 95 % interval +2.0 to +2.0)"
        in line
    )
    assert line.count(" against ") == 1 and line.endswith(
        "prompts."
    )  # its other budgets are not named
    assert body.index(line) < body.index(found.verification.headline) < body.index("The plan beats")


def test_the_plan_is_compared_with_every_other_policy(beaten):
    found = load_findings(beaten)
    others = set(found.verification.results["policy"]) - {PLAN}
    assert {one.baseline for one in found.plan_comparisons} == others and GATE in others
    of_fewer = next(one for one in found.plan_comparisons if one.baseline == FEWER_STEPS)
    assert of_fewer.difference == pytest.approx((3 + 3 - 2) / 3)
    page = render(found, {"replay": (plots.curves({}), ""), "pareto": (plots.curves({}), "")})
    assert page.index("The plan against every other policy") < page.index(
        "The fitted gate against every other policy"
    )


def test_without_a_plan_nothing_is_said_of_one(run):
    found = load_findings(run)
    assert found.plan_comparisons == [] and not any(
        "the plan" in line.lower() for line in found.first_lines
    )


def test_figures_of_the_embedded_model_are_labelled(page):
    assert "say nothing about any other model" in page[: page.index("<h2>")]


def test_the_page_fetches_nothing_and_is_well_formed(page):
    outside = re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)[^"']*""", page)
    assert not outside and "@import" not in page and "<script" not in page
    assert not re.findall(r"url\((?!#|data:)", page)
    parser = _Balance()
    parser.feed(page)
    assert parser.open == []


def test_light_and_dark_and_narrow_are_provided_for(page):
    assert "prefers-color-scheme: dark" in page and "currentColor" in page
    assert 'name="viewport"' in page and "overflow-x: auto" in page
    assert not re.search(r'<svg[^>]* width="\d', page)


def test_the_same_run_gives_the_same_page(run, page):
    assert report(run).read_text(encoding="utf-8") == page


def test_texts_are_escaped(run):
    found = load_findings(run)
    evil = "<script>alert('x')</script> & more"
    entry = dataclasses.replace(found.entry, title=evil, warnings=(evil,), notes=evil)
    page = render(dataclasses.replace(found, entry=entry), report_figures(found))
    assert "<script" not in page and "&lt;script&gt;" in page


def test_a_run_without_verification_is_reported_as_such(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("verify", "report"))
    entry = coeffs.load(folder / "entry.yaml")
    replayed = tuple(row for row in entry.thresholds if row.kind == "replay")
    coeffs.save(dataclasses.replace(entry, thresholds=replayed), folder / "entry.yaml")
    page = report(folder).read_text(encoding="utf-8")
    assert "Not verified" in page[: page.index("<h2>")] and "<h2>Verification" not in page
    assert not (folder / "report" / "pareto.png").exists()


def test_command_line(run, tmp_path):
    result = CliRunner().invoke(cli, ["report", str(run)])
    assert result.exit_code == 0 and result.output.strip().endswith("report.html")
    result = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_the_shipped_example_is_small_and_real():
    size = sum(path.stat().st_size for path in example_run().rglob("*") if path.is_file())
    assert size <= 300_000
    found = load_findings(example_run())
    assert found.run.manifest["model"] == "tiny-longcat-image" and found.verification is not None
    assert found.run.log_sha256 == found.entry.source.log_sha256
    assert found.samples() and found.patterns()
