"""vLLM-Omni's MagCache: the JSON object of ``--cache-config`` (``--cache-backend mag_cache``).

One list of ratios, index = step; every call of the denoiser counts as a step. A plan is written as crafted ratios; the
retention ratio must lie above 0, so it is set below half a step.
"""

import json

from coeffs.engines.plans import (
    crafted,
    is_crafted,
    planned,
    recorded_ratios,
    runs,
    schedule_of,
    wants_plan,
)
from coeffs.engines.releases import releases
from coeffs.engines.setting import Carried, Request, checked
from coeffs.engines.text import cap, number_list, read_json

ENGINE = "vllm-omni-magcache"
NO_RETENTION = 1e-6  # of the steps: rounds to none for any number of steps below 500,000


def write(request: Request) -> str:
    form: dict[str, object] = {}
    if wants_plan(request):
        plan, notes = planned(request, ENGINE)
        ratios = crafted(plan)
        form["mag_max_skip_steps"] = max(runs(plan.schedule, "S"))
        form["mag_retention_ratio"] = NO_RETENTION
    else:
        _, notes = checked(request, ENGINE)
        branch, recorded = next(iter(recorded_ratios(request.entry, "transformer").items()))
        ratios = list(recorded)
        notes.append(
            f"the ratios of branch {branch}; threshold and retention stay at vLLM-Omni's defaults"
        )
        if request.entry.max_skips is not None:
            form["mag_max_skip_steps"] = request.entry.max_skips
    form |= {"mag_ratios": ratios, "num_inference_steps": len(ratios)}
    return json.dumps({"_comment": "; ".join(notes), **form}) + "\n"


def read(text: str) -> Carried:
    form = read_json(text, required={"mag_ratios"}, known=releases()[ENGINE].keys)
    ratios = number_list(form["mag_ratios"], "mag_ratios")
    if is_crafted(ratios):
        return Carried(schedule=schedule_of(ratios))
    return Carried(
        mag_ratios={"transformer": {"pooled": ratios}},
        max_skips=cap(form.get("mag_max_skip_steps")),
    )
