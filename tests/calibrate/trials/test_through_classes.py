"""The tables of classes for cache-dit and diffusers' MagCache are what these engines do with every tiny model."""

from types import SimpleNamespace

import pytest
import torch
import zoo

import coeffs
from calibrate.trials.through import ENGINES, run_through, through_setting
from coeffs.engines.releases import releases

pytestmark = pytest.mark.filterwarnings("ignore")

SCHEDULE = "CCSCSS"
STEPS = len(SCHEDULE)
# Handed over as a class that both engines take, so that the engine answers and not our table.
PLANNED = coeffs.Entry(
    model="tiny",
    status="measured",
    transformer_class="FluxTransformer2DModel",
    signal="modulated_input",
    target="output",
    protocol={"num_steps": STEPS},
    experts={"transformer": coeffs.Expert(mag_ratios={"cond": (1.0,) * STEPS})},
    plans=(coeffs.Plan(schedule=SCHEDULE),),
)


# cache-dit knows it by its pipeline only, with which test_through.py runs it.
BY_PIPELINE = {("cache-dit", "SD3Transformer2DModel")}


def executes_the_plan(engine: str, name: str) -> bool:
    """False too where the engine raises, whatever it raises."""
    model = zoo.build(name)
    session = SimpleNamespace(modules={"transformer": model}, pipeline=model)
    setting = through_setting("plan", engine, PLANNED, PLANNED.plans[0])
    try:
        with run_through(session, setting) as executed, torch.no_grad():
            for arguments in zoo.trajectory(name, STEPS):
                zoo.run(model, arguments)
            return list(executed().values()) == [SCHEDULE]
    except Exception:
        return False


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cls", sorted({tiny.cls for tiny in zoo.TINY.values()}))
def test_a_class_is_in_the_table_if_the_engine_executes_the_plan_on_it(engine, cls):
    if engine == "cache-dit":
        pytest.importorskip("cache_dit")
    # Both engines put their hooks on a first and a last block, so a model of one block is none for them.
    names = [
        name
        for name, tiny in zoo.TINY.items()
        if tiny.cls == cls and not name.endswith("one_block")
    ]
    executes = all(executes_the_plan(engine, name) for name in names)
    known = cls in releases()[ENGINES[engine][0]].classes and (engine, cls) not in BY_PIPELINE
    assert executes == known
