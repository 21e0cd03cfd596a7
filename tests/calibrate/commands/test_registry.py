"""The commands of the registry: what they print, where, and with which exit code."""

import csv
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from coeffs_samples import sample_entry

import coeffs
from calibrate.cli import cli
from calibrate.commands.registry import COMMANDS
from coeffs import store


@pytest.fixture(autouse=True)
def no_registry_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv(store.ENVIRONMENT, raising=False)
    for name in ("XDG_DATA_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "data"))
    monkeypatch.setattr(store.Path, "home", lambda: tmp_path / "home")


@pytest.fixture
def run_folder(tmp_path):
    coeffs.save(sample_entry(), tmp_path / "run" / "entry.yaml")
    return str(tmp_path / "run")


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    """Test runners tell their workers a width."""
    monkeypatch.delenv("COLUMNS", raising=False)


def calibrate(*arguments: str, code: int = 0, given: str | None = None):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], input=given)
    assert result.exit_code == code, (result.output, result.exception)
    if code:
        assert result.stderr.strip().splitlines()[-1].startswith(("Error:", "Usage:")), (
            result.stderr
        )
    return result


def test_list_filters_and_prints_a_table():
    result = calibrate("list", "--model", "longcat")
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["entry", "status", "steps"]
    assert [line.split()[0] for line in lines[1:] if "/" in line.split()[0]] == [
        "sglang/longcat-image-borrowed@v1",
        "sglang/longcat-image-pr36767@v1",
        "vllm-omni/longcat-image@v1",
    ]
    assert lines[1].split()[:2] == ["sglang/longcat-image-borrowed@v1", "copied"]
    assert len(calibrate("list", "--status", "copied").stdout.splitlines()) == 1 + 17
    assert (
        len(
            calibrate(
                "list", "--engine", "lightx2v", "--status", "published"
            ).stdout.splitlines()
        )
        == 1 + 8
    )
    assert len(calibrate("list", "--model", "no such model").stdout.splitlines()) == 1


def test_list_as_json_is_whole_entries_and_as_csv_the_rows():
    found = json.loads(calibrate("list", "--model", "mochi", "--format", "json").stdout)
    assert [coeffs.entry.schema.from_plain(one) for one in found] == [
        coeffs.load("alivilab/mochi-1")
    ]
    rows = list(csv.DictReader(io.StringIO(calibrate("list", "--format", "csv").stdout)))
    assert len(rows) >= 67
    assert {row["entry"]: row["thresholds"] for row in rows}[
        "alivilab/mochi-1@v1"
    ] == "0.06 (1.5x), 0.09 (2.1x)"


def test_list_names_a_broken_file_and_shows_the_others(tmp_path):
    (tmp_path / "registry" / "broken").mkdir(parents=True)
    (tmp_path / "registry" / "broken" / "v1.yaml").write_text(
        "schema: 1\nmodel: broken\nmodel: broken\n"
    )
    result = calibrate("list", "--registry", tmp_path / "registry")
    assert "v1.yaml:3: model: duplicate key 'model'" in result.stderr
    assert len(result.stdout.splitlines()) >= 68


def test_show_is_readable_and_as_yaml_exact(run_folder):
    text = calibrate("show", run_folder).stdout
    for expected in (
        "longcat-image@v0",
        "status:     measured",
        "sign rule:  clamp",
        "domain 0.01 to 0.4",
        "r2_held_out 0.78",
        "transformer/cond (degree 3, polyfit, recommended)",
        "plan: CCSC (3 computed)",
        "warning: 1.10",
    ):
        assert expected in text
    assert coeffs.loads(calibrate("show", run_folder, "--yaml").stdout) == sample_entry()
    assert (
        "copied from alivilab/cogvideox-5b" in calibrate("show", "alivilab/consisid").stdout
    )


def test_diff_shows_numbers_domains_and_curves_side_by_side():
    text = calibrate("diff", "vllm-omni/longcat-image", "sglang/longcat-image-pr36767").stdout
    for expected in (
        "sign_rule",
        "x^4",
        "652.6",
        "-48.33",
        "-107%",
        "domain",
        "0.1968",
        "0.2981",
        "<-",
        "x from 0 to 0.5, no domain is known: apart by more than 25% at 9 of 11 points",
    ):
        assert expected in text


def test_diff_stays_on_the_common_domain(tmp_path):
    paths = []
    for name, domain in (("a", (0.0, 0.2)), ("b", (0.1, 0.4)), ("c", (0.3, 0.4))):
        fit = {"coefficients_high_to_low": [1.0, 0.0], "domain": domain}
        entry = sample_entry(
            experts={"transformer": {"recommended": "p", "branches": {"p": fit}}}
        )
        paths.append(coeffs.save(entry, tmp_path / f"{name}.yaml"))
    assert (
        "x from 0.1 to 0.2: apart by more than 25% at 0 of 11 points"
        in calibrate("diff", paths[0], paths[1]).stdout
    )
    assert "the domains do not meet" in calibrate("diff", paths[0], paths[2]).stdout


def test_check_of_the_shipped_registry_passes():
    assert "entries, all as released" in calibrate("check").stdout


def test_check_names_each_problem_and_exits_with_1(tmp_path, run_folder):
    path = coeffs.publish(sample_entry(), tmp_path / "registry")
    path.write_text(path.read_text() + "# edited\n")
    result = calibrate("check", "--registry", tmp_path / "registry", code=1)
    assert "changed after its release" in result.stdout and "1 problem" in result.stderr
    draft = sample_entry(
        source={"command": "calibrate --out /home/me/run"},
        thresholds=(),
        protocol={},
        experts={
            "transformer": {
                "recommended": "p",
                "branches": {
                    "p": {"coefficients_high_to_low": [1.0, -0.1], "domain": [0, 1]}
                },
            }
        },
    )
    coeffs.save(draft, tmp_path / "bad" / "entry.yaml")
    text = calibrate("check", run_folder, tmp_path / "bad", code=1).stdout
    for expected in (
        "a machine's path in source.command",
        "source.run_id is missing",
        "source.log_sha256 is missing",
        "protocol.num_steps is missing",
        "no thresholds",
        "negative on its domain",
        "no count of pairs",
        "no held-out figure",
        "run: sound",
    ):
        assert expected in text, text


def test_export_writes_to_stdout_or_a_file(tmp_path):
    wan = ["export", "alivilab/wan2.1-t2v-1.3b", "--to", "sglang"]
    text = calibrate(*wan, "--threshold", "0.08").stdout
    assert (
        text.startswith("# alivilab/wan2.1-t2v-1.3b@v1 (published)")
        and "TeaCacheParams(" in text
    )
    calibrate(*wan, "--threshold", "0.08", "--out", tmp_path / "x.py")
    assert (tmp_path / "x.py").read_text() == text
    result = calibrate(*wan, code=2)
    assert "choose with --threshold" in result.stderr and result.stdout == ""
    mask = calibrate(
        "export", "mochi-1", "--to", "cache-dit-mask", "--schedule", "CCS"
    ).stdout
    assert "steps_computation_mask: [1, 1, 0]" in mask


def test_what_an_engine_misreads_is_one_line_or_forced():
    flux = ["export", "alivilab/flux1-dev", "--to", "sglang", "--threshold", "0.25"]
    result = calibrate(*flux, code=2)
    assert (
        result.stderr.count("\n") == 1
        and "has code for WanTransformer3DModel only" in result.stderr
    )
    assert "WARNING, written with --force" in calibrate(*flux, "--force").stdout
    result = calibrate(*flux, "--release", "0.4.0", code=2)
    assert result.stderr.count("\n") == 1 and "known for 0.5.23 only" in result.stderr


def test_import_reads_a_form_from_a_file_or_stdin(tmp_path):
    form = calibrate("export", "vllm-omni/longcat-image", "--to", "vllm-omni").stdout
    text = calibrate(
        "import",
        "-",
        "--from",
        "vllm-omni",
        "--model",
        "mine",
        "--signal",
        "modulated_input",
        "--copied-from",
        "x",
        given=form,
    ).stdout
    entry = coeffs.loads(text)
    assert (entry.label, entry.status, entry.copied_from) == ("mine@v0", "copied", "x")
    assert (
        entry.fit().coefficients_high_to_low
        == coeffs.load("vllm-omni/longcat-image").fit().coefficients_high_to_low
    )
    like = calibrate(
        "import",
        "-",
        "--from",
        "vllm-omni",
        "--like",
        "vllm-omni/longcat-image",
        "--out",
        tmp_path / "e.yaml",
        given=form,
    )
    assert like.stdout == "" and coeffs.load(tmp_path / "e.yaml") == coeffs.load(
        "vllm-omni/longcat-image"
    )
    assert (
        "give --model"
        in calibrate("import", "-", "--from", "vllm-omni", given=form, code=2).stderr
    )


def test_publish_releases_the_next_version(tmp_path, run_folder):
    assert calibrate("publish", run_folder, "--dry-run").stdout == "fit for release\n"
    first = calibrate("publish", run_folder, "--registry", tmp_path / "registry").stdout
    assert first.rstrip().endswith("v1.yaml")
    assert (
        "already says exactly this"
        in calibrate(
            "publish", run_folder, "--registry", tmp_path / "registry", code=1
        ).stderr
    )
    calibrate("publish", run_folder)
    assert (tmp_path / "data" / "teacal" / "registry" / "longcat-image" / "v1.yaml").exists()
    assert coeffs.load("longcat-image").version == 1


def test_publish_refuses_an_unfit_draft_and_publishes_nothing(tmp_path):
    coeffs.save(sample_entry(thresholds=()), tmp_path / "run" / "entry.yaml")
    result = calibrate(
        "publish", tmp_path / "run", "--registry", tmp_path / "registry", code=1
    )
    assert "error: no thresholds" in result.stderr and "not fit for release" in result.stderr
    assert not (tmp_path / "registry").exists()


@pytest.mark.parametrize("width", [None, 80, 130])
def test_tables_fit_the_terminal_or_100_columns(width, monkeypatch, tmp_path):
    monkeypatch.delenv("COLUMNS", raising=False)
    if width:
        monkeypatch.setenv("COLUMNS", str(width))
    long_notes = sample_entry(notes="a long remark " * 30, warnings=("mind this " * 30,))
    path = coeffs.save(long_notes, tmp_path / "entry.yaml")
    for arguments in (
        ("list",),
        ("show", path),
        ("show", "tiny-longcat-image"),
        ("diff", path, "mlx-teacache/flux2-klein-base-4b"),
    ):
        lines = calibrate(*arguments).stdout.splitlines()
        assert max(map(len, lines)) <= (width or 100), max(lines, key=len)
        assert len(lines) > 5


def test_show_has_every_measure_of_a_threshold(tmp_path):
    measured = {"psnr_db": 31.5, "snr_db": 12.5, "ssim": 0.875, "lpips": 0.0625}
    measured |= {"worst_psnr_db": 21.5, "latent_rel_l2": 0.125, "speedup": 1.75}
    row = {
        "threshold": 0.2,
        "kind": "verified",
        "computed_steps": 14.5,
        "num_steps": 28,
    } | measured
    path = coeffs.save(sample_entry(thresholds=[row]), tmp_path / "entry.yaml")
    lines = calibrate("show", path).stdout.splitlines()
    shown = next(line for line in lines if "verified" in line).split()
    assert {f"{value:.4g}" for value in measured.values()} <= set(shown)


def test_list_has_a_line_for_every_entry():
    lines = calibrate("list").stdout.splitlines()
    assert len(lines) == 1 + len(coeffs.entries())


def fitted(r2: float, prompts: int = 70, **changes) -> coeffs.Entry:
    fit = {
        "coefficients_high_to_low": [1.0, 0.0],
        "domain": (0.0, 0.2),
        "counts": {"prompts": prompts, "pairs": 27 * prompts},
        "figures": {"r2_held_out": r2, "rmse_held_out": 0.1},
    }
    expert = {"recommended": "cond", "branches": {"cond": fit}}
    return sample_entry(experts={"transformer": expert}, **changes)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (fitted(-0.5), "no better than a constant (held-out R² -0.50)"),
        (fitted(0.0), "no better than a constant"),
        (fitted(0.8, prompts=2), "2 prompts, expected at least 8"),
        (
            fitted(0.01, warnings=("transformer/cond: no better: skip uniformly instead",)),
            "skip uniformly instead",
        ),
    ],
)
def test_an_entry_of_no_worth_is_released_only_by_force(entry, reason, tmp_path):
    coeffs.save(entry, tmp_path / "run" / "entry.yaml")
    registry = ("--registry", tmp_path / "registry")
    refused = calibrate("publish", tmp_path / "run", *registry, code=1)
    assert reason in refused.stderr and "--force" in refused.stderr
    assert not (tmp_path / "registry").exists()
    assert reason in calibrate("check", tmp_path / "run", code=1).stdout
    assert (
        "fit for release"
        in calibrate("publish", tmp_path / "run", "--force", "--dry-run").stdout
    )
    forced = calibrate("publish", tmp_path / "run", "--force", *registry)
    assert reason in forced.stderr and "v1.yaml" in forced.stdout


def test_force_releases_nothing_that_is_incomplete(tmp_path):
    coeffs.save(sample_entry(thresholds=()), tmp_path / "run" / "entry.yaml")
    result = calibrate("publish", tmp_path / "run", "--force", "--dry-run", code=1)
    assert "error: no thresholds" in result.stderr


def test_the_entrys_own_warnings_are_always_repeated(tmp_path):
    entry = fitted(0.8, warnings=("transformer/cond: poor on dark images",))
    coeffs.save(entry, tmp_path / "run" / "entry.yaml")
    warning = "warning: transformer/cond: poor on dark images"
    assert warning in calibrate("publish", tmp_path / "run", "--dry-run").stderr
    checked = calibrate("check", tmp_path / "run").stdout
    assert warning in checked and "sound" in checked


def test_a_version_published_into_a_registry_is_found_by_its_name(tmp_path, monkeypatch):
    """The shipped versions of the same model once hid it."""
    shipped = coeffs.load("tiny-longcat-image")
    entry = dataclasses.replace(shipped, notes="measured again")
    coeffs.publish(entry, tmp_path / "registry")
    monkeypatch.setenv(store.ENVIRONMENT, str(tmp_path / "registry"))
    published = f"tiny-longcat-image@v{shipped.version + 1}\n"
    assert calibrate("show", "tiny-longcat-image").stdout.startswith(published)


def test_publish_says_where_its_name_would_not_find_it(tmp_path, monkeypatch, run_folder):
    registry = tmp_path / "registry"
    aside = calibrate("publish", run_folder, "--registry", registry)
    advice = f"put {registry} first in {store.ENVIRONMENT}"
    assert f"longcat-image alone means nothing here: {advice}" in aside.stderr
    monkeypatch.setenv(store.ENVIRONMENT, str(registry))
    coeffs.save(sample_entry(notes="again"), Path(run_folder) / "entry.yaml")
    hidden = calibrate("publish", run_folder)
    assert "longcat-image alone means longcat-image@v1 here" in hidden.stderr
    coeffs.save(sample_entry(notes="third"), Path(run_folder) / "entry.yaml")
    found = calibrate("publish", run_folder, "--registry", registry)
    assert "alone means" not in found.stderr and found.stdout.endswith("v3.yaml\n")


def test_the_rounded_threshold_that_show_prints_is_the_entrys(tmp_path):
    rows = [
        {"threshold": 0.0270799123, "kind": "verified"},
        {"threshold": 0.3, "kind": "replay"},
    ]
    path = coeffs.save(sample_entry(thresholds=rows), tmp_path / "entry.yaml")
    printed = next(
        line for line in calibrate("show", path).stdout.splitlines() if "verified" in line
    )
    rounded = printed.split()[0]
    assert rounded == "0.02708"
    text = calibrate(
        "export", path, "--to", "vllm-omni", "--threshold", rounded, "--force"
    ).stdout
    assert "0.0270799123" in text and "not one that the entry reports on" not in text


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="a full disk is played by /dev/full"
)
@pytest.mark.parametrize(
    "arguments",
    [
        ("list",),
        ("show", "mochi-1"),
        ("export", "alivilab/wan2.1-t2v-1.3b", "--to", "json"),
    ],
)
def test_a_full_disk_is_one_line_and_exit_2(arguments):
    command = [sys.executable, "-m", "calibrate", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.returncode == 2
    assert "No space left on device" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, run_folder):
    """Whatever keeps an entry from its release, `publish` ends with 1; other commands with 2."""
    (tmp_path / "file").write_text("")
    registry = tmp_path / "file" / "registry"
    published = calibrate("publish", run_folder, "--registry", registry, code=1)
    assert "Not a directory; nothing was published" in published.stderr
    out = tmp_path / "file" / "x.py"
    exported = calibrate("export", "mochi-1", "--to", "json", "--out", out, code=2)
    assert "nothing was changed" in exported.stderr


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("show", "mochi-2"), "did you mean alivilab/mochi-1?"),
        (("export", "mochi-1", "--to", "sglan"), "did you mean sglang"),
        (("import", "-", "--from", "tensorrt"), "did you mean tensorrt-llm"),
        (("list", "--engine", "lightx2"), "did you mean lightx2v?"),
        (("list", "--engine", "qqq"), "is not one of"),
    ],
)
def test_what_was_probably_meant_is_said(arguments, hint):
    assert hint in " ".join(calibrate(*arguments, code=2).stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "nothing-like-it"), "no entry 'nothing-like-it'"),
        (("show", "longcat-image"), "name one of them in full"),
        (("list", "--registry", "/no/such/folder"), "is not a folder"),
        (("diff", "mochi-1", "consisid"), "was copied from"),
        (("export", "mochi-1", "--to", "unknown"), "is not one of 'vllm-omni'"),
        (("publish", "/no/such/run"), "does not exist"),
        (("check", "/no/such/entry.yaml"), "No such file or directory"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(arguments, message):
    assert message in " ".join(calibrate(*arguments, code=2).stderr.split())


def test_every_command_has_a_one_line_help_with_an_example():
    for command in COMMANDS:
        text = CliRunner().invoke(command, ["--help"]).stdout
        assert "Example:" in text and f"calibrate {command.name} " in text, command.name
        assert cli.get_command(None, command.name) is command
