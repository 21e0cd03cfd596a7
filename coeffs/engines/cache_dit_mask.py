"""cache-dit: a fixed ``steps_computation_mask`` for ``load_configs``, in YAML, from a plan.

1 computes a step, 0 uses the cache; ``static`` follows the mask exactly. One block computes on every step, as the mask
needs no comparison of blocks. Guidance in two calls a step has to be said, or each call counts as a step.
"""

from coeffs.engines.plans import ONE_BLOCK, planned, read_mask
from coeffs.engines.releases import two_calls
from coeffs.engines.setting import Carried, Request
from coeffs.engines.text import Form, read_section, yaml_text


def write(request: Request) -> str:
    plan = planned(request)
    form: Form = {
        "num_inference_steps": len(plan.schedule),
        **ONE_BLOCK,
        "steps_computation_mask": plan.mask,
        "steps_computation_policy": "static",
    }
    separate = two_calls(request.entry)
    if separate is None:
        request.notes.append(
            "whether guidance takes two calls a step is not known: cache-dit's default for the class holds"
        )
    else:
        form["enable_separate_cfg"] = separate
    return yaml_text(request.notes, "cache_config", form | plan.taylorseer)


def read(text: str) -> Carried:
    return read_mask(read_section(text, "cache_config"))
