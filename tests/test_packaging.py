"""What a light installation can do, what it says about the rest, and foreign modules in the way."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import teacal

ROOT = Path(teacal.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# An interpreter in which none of the packages of the extra `all` can be imported.
LIGHT = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {teacal.EXTRA!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
PROGRAM = LIGHT + "sys.argv[0] = 'calibrate'\nimport teacal\nteacal.main()\n"


def run(
    code: str, *arguments: object, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def names(requirements: list[str]) -> set[str]:
    return {requirement.split(">")[0].split("[")[0] for requirement in requirements}


def test_the_extra_holds_what_the_light_installation_lacks():
    assert names(PROJECT["dependencies"]) == {"pyyaml", "click", "click-default-group"}
    assert names(PROJECT["optional-dependencies"]["all"]) == set(teacal.EXTRA) - {"PIL"}


@pytest.mark.parametrize("package", teacal.PACKAGES)
def test_the_packages_say_that_they_are_typed(package):
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (("list", "--model", "longcat"), "vllm-omni/longcat-image@v1"),
        (("show", "tiny-longcat-image"), "status:     measured"),
        (("diff", "vllm-omni/longcat-image", "sglang/longcat-image-pr36767"), "x^4"),
        (("check",), "all as released"),
        (("export", "alivilab/wan2.1-t2v-1.3b", "--to", "json"), "WanTransformer3DModel"),
        (("--help",), "calibrate publish RUN"),
        (("record", "--help"), "Usage"),
    ],
)
def test_the_registry_needs_no_heavy_package(arguments, printed):
    done = run(PROGRAM, *arguments)
    assert (done.returncode, done.stderr.count("Error")) == (0, 0), done.stderr
    assert printed in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--out", "run"),
        ("record", "--out", "run"),
        ("fit", "run"),
        ("plan", "run"),
        ("verify", "run"),
        ("report", "run"),
    ],
)
def test_a_missing_package_is_one_line_that_names_the_extra(arguments, tmp_path):
    (tmp_path / "run").mkdir()
    done = run(PROGRAM, *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert "is not installed" in done.stderr and "pip install 'teacal[all]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_an_import_error_of_ours_is_not_called_a_missing_package():
    assert teacal.missing_package(ImportError("broken", name="runtime.apply")) is None
    assert "teacal[all]" in str(teacal.missing_package(ImportError("no", name="torch.nn")))


@pytest.mark.parametrize("package", teacal.PACKAGES)
def test_a_module_in_the_way_is_named_in_one_line(package, tmp_path):
    (tmp_path / f"{package}.py").write_text("# the user's own\n")
    done = run("import teacal; teacal.main()", "list", folder=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"{package}.py is in the way of teacal's own package {package}" in done.stderr


@pytest.mark.parametrize(
    ("statement", "package"),
    [("from calibrate import fit", "runtime"), ("import runtime", "coeffs")],
)
def test_an_import_says_which_module_is_in_the_way(statement, package, tmp_path):
    (tmp_path / f"{package}.py").write_text("# the user's own\n")
    done = run(statement, folder=tmp_path)
    assert done.stderr.splitlines()[-1].startswith("ImportError: ")
    assert f"{package}.py is in the way" in done.stderr.splitlines()[-1]


def test_a_module_of_the_users_own_that_nothing_needs_is_left_alone(tmp_path):
    (tmp_path / "calibrate.py").write_text("# the user's own\n")
    assert run("import runtime", folder=tmp_path).returncode == 0
