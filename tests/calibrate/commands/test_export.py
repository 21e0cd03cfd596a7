"""What `calibrate export` and `verify --through` refuse: one line on stderr, nothing on stdout, exit code 2."""

import pytest
from click.testing import CliRunner
from coeffs_samples import sample_entry, two_experts
from engine_readers import entry_for

import coeffs
from calibrate.cli import cli
from coeffs.engines import ENGINES
from coeffs.engines.releases import plan_forms, releases, takers

TEACACHE = takers("threshold")
OTHER = {"modulated_input": "time_embedding", "time_embedding": "modulated_input"}


@pytest.fixture
def refused(tmp_path):
    """The one line that a command is refused with; an entry is handed over as a file."""

    def run(command: str, entry: coeffs.Entry | str, *arguments: str) -> str:
        if isinstance(entry, coeffs.Entry):
            entry = str(coeffs.save(entry, tmp_path / "entry.yaml"))
        result = CliRunner().invoke(cli, [command, entry, *arguments])
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        (line,) = result.stderr.splitlines()
        return line

    return run


@pytest.mark.parametrize("engine", TEACACHE)
def test_the_wrong_signal(refused, engine):
    entry = entry_for(engine)
    wrong = sample_entry(
        transformer_class=entry.transformer_class,
        signal=OTHER.get(entry.signal, "modulated_input"),
    )
    line = refused("export", wrong, "--to", engine, "--threshold", "0.2")
    assert f"was fitted on the {wrong.signal}, {engine} compares" in line


@pytest.mark.parametrize(
    "engine", [name for name, release in releases().items() if release.known]
)
def test_the_wrong_class(refused, engine):
    entry = entry_for(engine, transformer_class="LatteTransformer3DModel")
    choice = ("--threshold", "0.2") if engine in TEACACHE else ("--schedule", "CCSC" * 7)
    line = refused("export", entry, "--to", engine, *choice)
    assert "is for LatteTransformer3DModel" in line


@pytest.mark.parametrize("engine", [name for name in releases() if name != "tensorrt-llm"])
def test_two_experts(refused, engine):
    """TensorRT-LLM has a slot for each."""
    entry = entry_for(engine)
    same = {name: getattr(entry, name) for name in ("engine", "transformer_class", "signal")}
    entry = two_experts(**same)
    choice = ("--threshold", "0.2") if engine in TEACACHE else ("--schedule", "CCSC" * 7)
    line = refused("export", entry, "--to", engine, *choice)
    assert "has one slot" in line or "counts the steps of each from 0" in line


@pytest.mark.parametrize("engine", releases())
def test_a_release_that_is_not_known(refused, engine):
    line = refused("export", entry_for(engine), "--to", engine, "--release", "99.9")
    assert f"release '99.9' of {engine}: what it does is known for" in line


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "json"])
def test_an_entry_without_the_content(refused, engine):
    fit = {
        "recommended": "pooled",
        "branches": {"pooled": {"coefficients_high_to_low": [1.0, 0.1]}},
    }
    bare = {"experts": {"transformer": coeffs.Expert()}}
    entry = entry_for(
        engine,
        **bare if engine in TEACACHE else {"experts": {"transformer": fit}, "plans": ()},
    )
    line = refused("export", entry, "--to", engine)
    assert any(f"has no {what}" in line for what in ("coefficients", "plan", "mag_ratios"))


@pytest.mark.parametrize("engine", takers("schedule"))
def test_another_number_of_steps(refused, engine):
    line = refused("export", entry_for(engine), "--to", engine, "--schedule", "CSSC")
    assert "schedule of 4 steps" in line and "was measured with 28" in line


def test_an_engine_that_is_not_known(refused):
    assert "--to: 'nope' is not one of 'vllm-omni'" in refused(
        "export", "tiny-longcat-image", "--to", "nope"
    )
    assert "is not one of 'cache-dit'" in refused(
        "verify", "tiny-longcat-image", "--through", "nope"
    )


@pytest.mark.parametrize("choice", ["threshold", "schedule", "release", "force"])
def test_an_option_that_the_form_has_no_place_for(refused, choice):
    value = {"threshold": ["0"], "schedule": ["CCSC"], "release": ["1"], "force": []}[choice]
    for engine in set(ENGINES) - set(takers(choice)):
        line = refused("export", "tiny-longcat-image", "--to", engine, f"--{choice}", *value)
        assert f"--{choice}: {engine} has no place for it, only" in line
    assert set(takers("threshold")).isdisjoint(plan_forms())
