"""vLLM-Omni's MagCache: the JSON object of ``--cache-config`` (``--cache-backend mag_cache``).

One list of ratios, index = step; every call of the denoiser counts as a step. A plan is written as crafted ratios; the
retention ratio must lie above 0, so it is set below half a step.
"""

from coeffs.engines.plans import mag_cache, read_ratios
from coeffs.engines.setting import Carried, Request
from coeffs.engines.text import Form, json_text, read_json, value_of
from coeffs.entry.fields import Numbers, Steps

NO_RETENTION = 1e-6  # of the steps: rounds to none for any number of steps below 500,000


def write(request: Request) -> str:
    form = mag_cache(request)
    branch, ratios = next(iter(form.only.items()))
    settings: Form = {} if form.cap is None else {"mag_max_skip_steps": form.cap}
    if form.crafted:
        settings["mag_retention_ratio"] = NO_RETENTION
    else:
        request.notes.append(
            f"the ratios of branch {branch}; threshold and retention stay at vLLM-Omni's defaults"
        )
    settings |= {"mag_ratios": ratios, "num_inference_steps": len(ratios)}
    return json_text(request.notes, settings)


def read(text: str) -> Carried:
    form = read_json(text, "vllm-omni-magcache")
    ratios = {"transformer": {"pooled": value_of(form, "mag_ratios", Numbers)}}
    return read_ratios(ratios, value_of(form, "mag_max_skip_steps", Steps | None))
