"""LightX2V's MagCache: keys of a model's configuration, in JSON.

Two lists of ratios, the conditional branch and the unconditional one, index = step. Without a calibration run its own
defaults stay for threshold, cap and retention. A plan is written as crafted ratios for both branches.
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
from coeffs.engines.setting import Carried, Request, checked
from coeffs.engines.text import cap, number_list, read_json
from coeffs.errors import EngineError

ENGINE = "lightx2v-magcache"
# The threshold, cap and retention of its configurations for Wan 2.1 I2V and HunyuanVideo-1.5; its code requires them.
DEFAULTS = {"magcache_thresh": 0.24, "magcache_K": 6, "magcache_retention_ratio": 0.2}


def write(request: Request) -> str:
    form = dict(DEFAULTS)
    if wants_plan(request):
        plan, notes = planned(request, ENGINE)
        ratios = [crafted(plan)] * 2
        form |= {"magcache_K": max(runs(plan.schedule, "S")), "magcache_retention_ratio": 0.0}
    else:
        _, notes = checked(request, ENGINE)
        ratios = _pair(request)
        notes.append("threshold, K and retention are LightX2V's own for Wan 2.1 I2V")
        if request.entry.max_skips is not None:
            form["magcache_K"] = request.entry.max_skips
    head = {"_comment": "; ".join(notes), "infer_steps": len(ratios[0]), "feature_caching": "Mag"}
    tail = {"magcache_calibration": False, **form, "magcache_ratios": ratios}
    return json.dumps(head | tail) + "\n"


def _pair(request: Request) -> list[list[float]]:
    if len(request.entry.experts) > 1:
        raise EngineError(
            f"{request.entry.label} has ratios for {' and '.join(request.entry.experts)}, LightX2V's MagCache has one "
            "slot: take an engine with one configuration per denoiser (diffusers-magcache)"
        )
    ratios = recorded_ratios(request.entry, "transformer")
    first = next(iter(ratios.values()))
    return [list(ratios.get("cond", first)), list(ratios.get("uncond", first))]


def read(text: str) -> Carried:
    form = read_json(text, required={"feature_caching", "magcache_ratios"})
    pair = form["magcache_ratios"]
    if form["feature_caching"] != "Mag" or not isinstance(pair, list) or len(pair) != 2:
        raise EngineError(
            "expected feature_caching Mag and magcache_ratios [conditional, unconditional]"
        )
    cond, uncond = (number_list(ratios, "magcache_ratios") for ratios in pair)
    if is_crafted(cond) and cond == uncond:
        return Carried(schedule=schedule_of(cond))
    ratios = {"pooled": cond} if cond == uncond else {"cond": cond, "uncond": uncond}
    return Carried(mag_ratios={"transformer": ratios}, max_skips=cap(form.get("magcache_K")))
