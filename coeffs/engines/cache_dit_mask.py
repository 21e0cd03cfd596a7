"""cache-dit: a fixed ``steps_computation_mask`` for ``load_configs``, in YAML, from a plan.

1 computes a step, 0 uses the cache; ``static`` follows the mask exactly. One block computes on every step, as the mask
needs no comparison of blocks. Guidance in two calls a step has to be said, or each call counts as a step.
"""

from coeffs.engines.plans import letters, mask, planned, taylor_order
from coeffs.engines.releases import releases, two_calls
from coeffs.engines.setting import Carried, Request
from coeffs.engines.text import comment, read_section, yaml_text

ENGINE = "cache-dit-mask"


def write(request: Request) -> str:
    plan, notes = planned(request, ENGINE)
    order = taylor_order(plan, releases()[ENGINE])
    form: dict[str, object] = {
        "num_inference_steps": len(plan.schedule),
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "steps_computation_mask": mask(plan),
        "steps_computation_policy": "static",
    }
    separate = two_calls(request.entry)
    if separate is None:
        notes.append(
            "whether guidance takes two calls a step is not known: cache-dit's default for the class holds"
        )
    else:
        form["enable_separate_cfg"] = separate
    if order:
        form |= {"enable_taylorseer": True, "taylorseer_order": order}
    return comment(notes) + yaml_text({"cache_config": form})


def read(text: str) -> Carried:
    form = read_section(text, "cache_config")
    return Carried(schedule=letters(form.get("steps_computation_mask"), "steps_computation_mask"))
