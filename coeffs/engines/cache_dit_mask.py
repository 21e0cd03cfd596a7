"""cache-dit: a fixed ``steps_computation_mask`` for ``load_configs``, in YAML, from a plan.

1 computes a step, 0 uses the cache; ``static`` follows the mask exactly. One block computes on every step, as the mask
needs no comparison of blocks.
"""

from coeffs.engines.plans import ONE_BLOCK, guidance, planned, read_mask
from coeffs.engines.setting import Carried, Request
from coeffs.engines.text import Form, read_section, yaml_text


def write(request: Request) -> str:
    plan = planned(request)
    form: Form = {
        "num_inference_steps": len(plan.schedule),
        **ONE_BLOCK,
        "steps_computation_mask": plan.mask,
        "steps_computation_policy": "static",
        **guidance(request),
        **plan.taylorseer,
    }
    return yaml_text(request.notes, "cache_config", form)


def read(text: str) -> Carried:
    return read_mask(read_section(text, "cache_config"))
