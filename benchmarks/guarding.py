"""What a guard on a plan is worth: computed steps that it adds, and fidelity beside plans that compute as many.

    python -m benchmarks.guarding runs/x --computed 15 --guards 0.05,0.1,0.2 --prompts FILE

The run needs an entry with plans for several budgets (`calibrate plan`). Without prompts, the recorded ones are used.
"""

import json

import click
import numpy as np

from benchmarks.common import RESULTS, surroundings, table


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.option("--model", help="Weights, where the run's are not known by name.")
@click.option("--computed", type=int, required=True, help="The plan to guard.")
@click.option("--guards", required=True, help="Comma-separated.")
@click.option("--prompts", help="File of prompts.")
@click.option("--num-prompts", type=int, default=8, show_default=True)
@click.option("--name", required=True, help="Of the result file.")
def main(
    run: str,
    model: str | None,
    computed: int,
    guards: str,
    prompts: str | None,
    num_prompts: int,
    name: str,
) -> None:
    from calibrate.model.prompts import load_prompts
    from calibrate.trials.case import open_case
    from calibrate.trials.measures import compare
    from calibrate.trials.sampler import Sampler
    from runtime import apply_tea_cache

    case = open_case(run, model=model, registry=None, out=None, dtype=None, device="auto")
    chosen = load_prompts(prompts, seed=1000).prompts if prompts else case.recorded_prompts
    chosen = chosen[:num_prompts]
    sampler = Sampler(case.pipeline, case.arguments, case.accepts)
    references = [sampler(prompt).media[0] for prompt in chosen]
    plans = {
        plan.computed_steps: plan
        for plan in case.entry.plans
        if len(plan.schedule) == case.num_steps
    }

    def measured(plan, guard: float | None) -> dict:
        fidelity, counts = [], []
        for prompt, reference in zip(chosen, references, strict=True):
            with apply_tea_cache(case.pipeline, case.entry, schedule=plan, guard=guard) as cache:
                fidelity.append(compare(sampler(prompt).media[0], reference)["psnr_db"])
                counts += [branch.pattern.count("C") for branch in cache.stats.branches.values()]
        click.echo(f"{plan.computed_steps} computed, guard {guard}", err=True)
        return {
            "computed": float(np.mean(counts)),
            "psnr_db": float(np.mean(fidelity)),
            "worst": float(min(fidelity)),
        }

    alone = {
        count: measured(plan, None) for count, plan in sorted(plans.items()) if count >= computed
    }
    rows, figures = [], []
    for guard in map(float, guards.split(",")):
        one = measured(plans[computed], guard)
        # A plan of its own for as many steps, between the plans that there are.
        counts = list(alone)
        rival = {
            key: float(np.interp(one["computed"], counts, [alone[c][key] for c in counts]))
            for key in one
        }
        figures.append({"guard": guard, **one, "plan_of_as_many": rival})
        rows.append(
            [guard, one["computed"], one["psnr_db"], one["worst"], rival["psnr_db"], rival["worst"]]
        )
    unguarded = alone[computed]
    click.echo(
        f"plan of {computed} alone: {unguarded['psnr_db']:.1f} dB, worst prompt {unguarded['worst']:.1f}\n"
    )
    click.echo(table(["guard", "computed", "dB", "worst", "plan of as many: dB", "worst"], rows))
    facts = {
        "model": case.entry.model,
        "prompts": len(chosen),
        "plan": computed,
        "plans_alone": alone,
    }
    path = RESULTS / f"guarding-{name}.json"
    path.write_text(
        json.dumps({"surroundings": surroundings(), **facts, "guarded": figures}, indent=1) + "\n"
    )
    click.echo(f"\n{path}", err=True)


if __name__ == "__main__":
    main()
