"""How well the open-loop error of a schedule, from the Gram log, ranks what real cached runs make of it.

Random schedules of one number of computed steps are replayed and run on prompts of the run itself, so that nothing but
the feedback through the sampler lies between the two. Random schedules differ more than good ones do: what is found is
an upper figure for the ranking of near-optimal ones.

    calibrate record --steps 20 --num-prompts 3 --dtype float32 --gram --out runs/short && calibrate fit runs/short
    python -m benchmarks.replay_vs_closed_loop runs/short --computed 8 --forecasts linear,reuse
"""

import json
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from scipy.stats import spearmanr

import coeffs
from benchmarks.common import table, write


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.option("--model", help="Weights, where the run's are not known by name.")
@click.option(
    "--name", default="replay_vs_closed_loop", show_default=True, help="Of the result file."
)
@click.option("--computed", type=int, required=True, help="Computed steps of every schedule.")
@click.option("--schedules", type=int, default=200, show_default=True)
@click.option("--num-prompts", type=int, default=1, show_default=True)
@click.option(
    "--forecasts",
    default="linear,reuse",
    show_default=True,
    help="Of outputs; fitted ones on all recorded prompts.",
)
@click.option(
    "--keep", type=click.Path(dir_okay=False), help="File of finished runs, to continue from."
)
def main(
    run: str,
    model: str | None,
    name: str,
    computed: int,
    schedules: int,
    num_prompts: int,
    forecasts: str,
    keep: str | None,
) -> None:
    from calibrate.planning.problem import Problem, fit_weights
    from calibrate.runs.gram_log import load_gram
    from calibrate.trials.case import open_case
    from calibrate.trials.measures import rel_l2
    from calibrate.trials.sampler import Sampler
    from calibrate.trials.setting import plan_setting

    case = open_case(run, model=model, registry=None, out=None, dtype=None, device="auto")
    log = load_gram(run)
    sampler = Sampler(case.session)
    prompts = case.recorded_prompts[:num_prompts]
    references = [sampler(prompt).latents for prompt in prompts]
    problem = Problem.of(log.select([log.prompt_ids.index(prompt.prompt_id) for prompt in prompts]))
    everyone = Problem.of(log)
    chosen = random_schedules(log.num_steps, computed, schedules)
    file = Path(keep) if keep else None
    done = {}
    if file and file.exists():
        done = {row["key"]: row["errors"] for row in map(json.loads, file.read_text().splitlines())}
    rows, figures = [], {}
    for forecast in forecasts.split(","):
        real = []
        weights = (
            {schedule: fit_weights(everyone, schedule) for schedule in chosen}
            if forecast == "fitted"
            else {}
        )
        for number, schedule in enumerate(chosen):
            key = f"{forecast} {schedule}"
            if key not in done:
                rows_of = tuple(weights[schedule].rows.values()) if weights else None
                plan = coeffs.Plan(
                    schedule=schedule, forecast=forecast, forecast_of="output", weights=rows_of
                )
                setting = plan_setting("random", plan)
                samples = [sampler.run(setting, prompt) for prompt in prompts]
                done[key] = [rel_l2(s.latents, r) for s, r in zip(samples, references, strict=True)]
                if file:
                    with file.open("a") as stream:
                        stream.write(json.dumps({"key": key, "errors": done[key]}) + "\n")
                click.echo(f"{forecast} {number + 1}/{len(chosen)}", err=True)
            real.append(np.mean(done[key]))
        signed = [
            problem.signed(schedule, weights.get(schedule, forecast)).mean() for schedule in chosen
        ]
        additive = [
            problem.additive(schedule, weights.get(schedule, forecast)).mean()
            for schedule in chosen
        ]
        best = int(np.argmin(real))
        found = {
            "schedules": len(chosen),
            "signed": rank_correlation(signed, real),
            "additive": rank_correlation(additive, real),
            "best_is_number_by_signed": 1 + int(np.sum(np.array(signed) < signed[best])),
            "best_is_number_by_additive": 1 + int(np.sum(np.array(additive) < additive[best])),
        }
        figures[forecast] = found
        rows.append([forecast, *found.values()])
    columns = [
        "forecast of outputs",
        "schedules",
        "signed",
        "additive",
        "best real one, by signed",
        "by additive",
    ]
    click.echo(
        f"{computed} of {log.num_steps} steps, {len(prompts)} prompts; Spearman's rank correlation\n"
    )
    click.echo(table(columns, rows))
    facts = {
        "model": case.entry.model,
        "steps": log.num_steps,
        "computed": computed,
        "prompts": len(prompts),
    }
    click.echo(f"\n{write(name, {**facts, 'forecasts': figures})}")


def random_schedules(num_steps: int, computed: int, count: int, seed: int = 0) -> list[str]:
    """Distinct random schedules that begin with a computed step."""
    from calibrate.planning.problem import schedule_of

    random, found = np.random.default_rng(seed), {}
    for _ in range(100 * count):
        if len(found) == count:
            break
        others = random.choice(np.arange(1, num_steps), computed - 1, replace=False)
        found[schedule_of([0, *others.tolist()], num_steps)] = None
    return list(found)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN for constant values."""
    return float(spearmanr(a, b).statistic)


if __name__ == "__main__":
    main()
