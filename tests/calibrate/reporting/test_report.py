"""The report says what was found, escapes what it is told, fetches nothing, and needs no verification."""

import base64
import dataclasses
import io
import re
import shutil
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from markupsafe import escape
from PIL import Image

import coeffs
from calibrate.cli import cli
from calibrate.errors import InvalidOption
from calibrate.reporting.report import render, report, report_figures
from calibrate.reporting.run_data import example_run, load_findings
from calibrate.trials.setting import FEWER_STEPS, GATE, PLAN, UNIFORM
from calibrate.verifying.advice import python_lines
from calibrate.verifying.results import load_verification, write_verification

pytestmark = pytest.mark.slow

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
NO_PICTURES = {}
VOID = {"meta", "br", "img", "path", "use", "image", "rect", "link", "input"}


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
        assert {path.stem for path in (run / "report").glob(f"*.{suffix}")} >= FIGURES | {
            "samples"
        }


def words(page):
    """What the page says, without marks and drawings."""
    body = re.sub(r"<(svg|style|script).*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body).replace("\xa0", " "))


def test_the_page_opens_with_the_advice_and_what_to_copy(run, page):
    found = load_findings(run)
    body = page[page.index("<main>") :].replace("\xa0", " ")
    lines = python_lines(found.advice, found.entry, run)
    places = [body.index(text) for text in (found.advice.use, found.advice.certainty)]
    places.append(body.index(str(escape(lines))))
    assert places == sorted(places) and places[0] < 700 and places[-1] < body.index("<h2>")
    assert body.count('class="copy"') >= 1
    assert "on unseen prompts" in body


def test_nothing_contradicts_the_advice_and_no_figure_is_missing(page):
    text = words(page)
    assert "no difference" not in text and " nan" not in text and "- to -" not in text


def verified_by(run, folder, results):
    """A copy of the run whose verification gave these results."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("report"))
    found = load_verification(folder)
    write_verification(dataclasses.replace(found, results=results(found.results)))
    return folder


def test_few_prompts_give_no_verdict_in_any_table(run, tmp_path):
    def of_six(results):
        return results[results["prompt_id"].isin(results["prompt_id"].unique()[:6])]

    page = render(load_findings(verified_by(run, tmp_path / "few", of_six)), NO_PICTURES)
    tables = words(page[page.index("every other policy") : page.index("<h2>Fit")])
    assert "too few prompts" in tables and "significantly" not in tables


@pytest.fixture(scope="module")
def planless(run, tmp_path_factory):
    """The run without its plan."""
    folder = tmp_path_factory.mktemp("report") / "planless"
    verified_by(run, folder, lambda results: results[results["policy"] != PLAN])
    entry = dataclasses.replace(coeffs.load(folder / "entry.yaml"), plans=None)
    coeffs.save(entry, folder / "entry.yaml")
    return folder


@pytest.fixture(scope="module")
def beaten(planless, tmp_path_factory):
    """The run with a plan that took part: fewer steps is better by 2 dB at its first budget, worse at the others."""
    folder = tmp_path_factory.mktemp("report") / "beaten"
    shutil.copytree(planless, folder)
    found = load_verification(folder)
    plan = found.results[found.results["policy"] == FEWER_STEPS].assign(policy=PLAN)
    plan["psnr_db"] += np.where(plan["budget"] == plan["budget"].max(), -2.0, 3.0)
    write_verification(
        dataclasses.replace(
            found, results=pd.concat([found.results, plan], ignore_index=True)
        )
    )
    return folder


def test_where_fewer_steps_is_better_the_advice_is_to_use_them(beaten):
    found = load_findings(beaten)
    rows = (
        found.verification.results.query("budget == 21").groupby("policy")["psnr_db"].mean()
    )
    assert rows[FEWER_STEPS] > rows[PLAN]
    plan = found.verification.results["policy"] == PLAN
    found.verification.results.loc[plan, "psnr_db"] -= 10
    page = render(found, NO_PICTURES)
    assert "Use 14 plain steps without a cache: " in words(page)


def test_the_plan_is_compared_with_every_other_policy(beaten):
    found = load_findings(beaten)
    others = set(found.verification.results["policy"]) - {PLAN}
    assert {one.baseline for one in found.plan_comparisons} == others and GATE in others
    of_fewer = [one for one in found.plan_comparisons if one.baseline == FEWER_STEPS]
    assert [one.difference for one in of_fewer] == pytest.approx([3, 3, -2])
    page = render(found, NO_PICTURES)
    assert page.index("The plan against every other policy") < page.index(
        "The fitted gate against every other policy"
    )


def test_without_a_plan_nothing_is_said_of_one(planless):
    found = load_findings(planless)
    page = render(found, NO_PICTURES)
    assert found.plan_comparisons == [] and "the plan" not in words(page).lower()


def test_the_report_shows_each_plan_with_its_pattern_and_figures(planless):
    schedule = "CCSC" * 7
    figures = {"psnr_db": 43.21, "worst_psnr_db": 38.5, "speedup": 1.75, "prompts": 8.0}
    plan = coeffs.Plan(
        schedule=schedule, forecast="linear", forecast_of="output", figures=figures
    )
    found = load_findings(planless)
    found = dataclasses.replace(found, entry=dataclasses.replace(found.entry, plans=(plan,)))
    page = render(found, NO_PICTURES)
    assert f'aria-label="{schedule}"' in page
    assert page.count('<i class="C">') == 21 and page.count('<i class="S">') == 7
    text = words(page)
    assert "1.75×, 43.2 dB, worst 38.5, on 8 prompts (measured when it was planned)" in text
    assert "Forecast: linear, of the denoiser's output." in unescape(text)


def test_pairs_of_images_have_a_slider_and_begin_with_the_worst_prompt(run, page):
    found = load_findings(run)
    samples = found.samples()
    assert [sample.quality for sample in samples] == sorted(
        sample.quality for sample in samples
    )
    policies = (PLAN, GATE, UNIFORM, FEWER_STEPS)
    count = sum(len(found.samples(policy, found.advice.budget)) for policy in policies)
    assert page.count('type="range"') == page.count('class="compare"') == count == 12
    page = page[page.index("<h3>Fitted gate") :]
    shown = re.findall(r'src="data:image/webp;base64,([^"]*)"', page)
    with Image.open(io.BytesIO(base64.b64decode(shown[1]))) as image:
        pixels = np.asarray(image)
    np.testing.assert_array_equal(pixels, np.round(255 * np.clip(samples[0].cached, 0, 1)))
    places = [page.index(f'<div class="note">{sample.prompt}') for sample in samples]
    assert places == sorted(places)


def test_every_prompt_has_its_row_the_worst_first(run, page):
    table = load_findings(run).by_prompt()
    assert len(table) == 8 and table.iloc[:, 0].is_monotonic_increasing
    rows = page[page.index("By prompt, at 14 of 28 steps") :]
    assert [rows.index(prompt) for prompt in table.index] == sorted(
        map(rows.index, table.index)
    )


def test_curves_that_lie_on_each_other_are_said_to(run):
    found = load_findings(run)
    assert found.coinciding("y") == ""
    assert (
        found.coinciding("x") == " cond and uncond coincide: uncond is drawn over the others."
    )
    assert "cond and uncond coincide" in render(found, report_figures(found))


def test_drawings_are_named_for_those_who_hear_the_page(page):
    drawn = re.findall(r"<svg[^>]*>", page)
    assert len(drawn) > 5 and all('role="img" aria-label="' in tag for tag in drawn)
    assert page.count("<title>") == 1 + len(drawn)
    assert all('alt="' in tag for tag in re.findall(r"<img[^>]*>", page))


@pytest.mark.parametrize(("floor", "said"), [
    ({"identical": False, "psnr_db": 51.24, "worst_psnr_db": 48.0}, "differ in the last place is 51.2 dB away"),
    ({"identical": True, "worst_psnr_db": None}, "s uncached."),
])  # fmt: skip
def test_the_noise_floor_is_said(run, floor, said):
    found = load_findings(run)
    found.verification.facts["floor"] = floor
    assert said in words(render(found, NO_PICTURES))


def test_figures_of_the_embedded_model_are_labelled(page):
    assert "say nothing about any other model" in page[: page.index("<h2>")]


def test_the_page_fetches_nothing_and_is_well_formed(page):
    outside = re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)[^"']*""", page)
    assert not outside and "@import" not in page and page.count("<script") == 1
    assert not re.findall(r"url\((?!#|data:)", page)
    parser = _Balance()
    parser.feed(page)
    assert parser.open == []


def test_light_and_dark_and_narrow_are_provided_for(page):
    assert "prefers-color-scheme: dark" in page and "currentColor" in page
    assert 'name="viewport"' in page and "overflow-x: auto" in page
    assert not re.search(r'<svg[^>]* width="\d', page)


def test_the_same_run_gives_the_same_page_by_the_command_too(run, page):
    result = CliRunner().invoke(cli, ["report", str(run)])
    assert result.exit_code == 0 and result.stdout.strip().endswith("report.html")
    assert (run / "report" / "report.html").read_text(encoding="utf-8") == page


def test_texts_are_escaped(run):
    found = load_findings(run)
    evil = "<script>alert('x')</script> & more"
    entry = dataclasses.replace(found.entry, title=evil, warnings=(evil,), notes=evil)
    page = render(dataclasses.replace(found, entry=entry), report_figures(found))
    assert evil not in page and page.count("<script") == 1 and "&lt;script&gt;" in page


def test_a_run_without_verification_is_reported_as_such(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("verify", "report"))
    entry = coeffs.load(folder / "entry.yaml")
    replayed = tuple(row for row in entry.thresholds if row.kind == "replay")
    coeffs.save(dataclasses.replace(entry, thresholds=replayed), folder / "entry.yaml")
    page = report(folder).read_text(encoding="utf-8")
    assert "Not verified" in page[: page.index("<h2>")] and "<h2>Verification" not in page
    assert not (folder / "report" / "pareto.png").exists()
    with pytest.raises(InvalidOption, match="not verified yet; run `calibrate verify"):
        load_findings(folder).samples()


def test_a_folder_without_a_run_is_refused(tmp_path):
    result = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_the_shipped_example_is_small_and_real():
    size = sum(path.stat().st_size for path in example_run().rglob("*") if path.is_file())
    assert size <= 300_000
    found = load_findings(example_run())
    assert (
        found.run.manifest["model"] == "tiny-longcat-image" and found.verification is not None
    )
    assert found.run.log_sha256 == found.entry.source.log_sha256
    assert found.samples() and found.patterns()
