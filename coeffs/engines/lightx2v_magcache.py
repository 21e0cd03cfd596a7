"""LightX2V's MagCache: keys of a model's configuration, in JSON.

Two lists of ratios, the conditional branch and the unconditional one, index = step. Without a calibration run its own
defaults stay for threshold, cap and retention. A plan is written as crafted ratios for both branches.
"""

from coeffs.engines.plans import mag_cache, read_ratios
from coeffs.engines.setting import Carried, Request
from coeffs.engines.text import Form, json_text, read_json, value_of
from coeffs.entry.fields import Numbers, Steps
from coeffs.errors import EngineError

# The threshold, cap and retention of its configurations for Wan 2.1 I2V and HunyuanVideo-1.5; its code requires them.
DEFAULTS = {"magcache_thresh": 0.24, "magcache_K": 6, "magcache_retention_ratio": 0.2}


def write(request: Request) -> str:
    form = mag_cache(request)
    settings = dict(DEFAULTS)
    if form.crafted:
        settings["magcache_retention_ratio"] = 0.0
    else:
        request.notes.append("threshold, K and retention are LightX2V's own for Wan 2.1 I2V")
    if form.cap is not None:
        settings["magcache_K"] = form.cap
    ratios = form.only
    first = next(iter(ratios.values()))
    whole: Form = {
        "infer_steps": len(first),
        "feature_caching": "Mag",
        "magcache_calibration": False,
        **settings,
        "magcache_ratios": [ratios.get(branch, first) for branch in ("cond", "uncond")],
    }
    return json_text(request.notes, whole)


def read(text: str) -> Carried:
    form = read_json(text)
    if form.get("feature_caching") != "Mag":
        raise EngineError("feature_caching: expected Mag")
    cond, uncond = value_of(form, "magcache_ratios", tuple[Numbers, Numbers])
    ratios = {"pooled": cond} if cond == uncond else {"cond": cond, "uncond": uncond}
    return read_ratios({"transformer": ratios}, value_of(form, "magcache_K", Steps | None))
