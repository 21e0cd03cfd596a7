"""ComfyUI-TeaCache: a line of the table in ``nodes.py`` and the inputs of the node.

The node picks its code by parts of ``model_type``: FLUX takes predictions absolute, the others keep their sign. Steps
outside ``start_percent`` to ``end_percent`` of the schedule compute.
"""

import re

from coeffs.engines.releases import projected
from coeffs.engines.setting import Carried, Request, setting, steps
from coeffs.engines.text import comment, number_list, read_item
from coeffs.entry.schema import Entry
from coeffs.errors import EngineError

ENGINE = "comfyui-teacache"
TABLE = "SUPPORTED_MODELS_COEFFICIENTS"
# The part of model_type that selects the code for a class.
FAMILIES = {
    "FluxTransformer2DModel": "flux",
    "LTXVideoTransformer3DModel": "ltxv",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "Lumina2Transformer2DModel": "lumina_2",
    "HiDreamImageTransformer2DModel": "hidream_i1_full",
    "WanTransformer3DModel": "wan2.1",
}
_INPUTS = re.compile(
    r"# node inputs: .*rel_l1_thresh=([0-9.e+-]+), start_percent=([0-9.e+-]+), end_percent=([0-9.e+-]+)"
)


def write(request: Request) -> str:
    entry = request.entry
    family = FAMILIES.get(entry.transformer_class or "", "flux")  # unknown ones only with --force
    chosen = setting(request, ENGINE, _sign_rule(family))
    key = _model_type(entry, family)
    inputs = {
        "model_type": f'"{key}"',
        "rel_l1_thresh": chosen.threshold,
        "start_percent": _start(entry),
        "end_percent": _end(entry),
    }
    notes = [*chosen.notes, "append to nodes.py, and add the key to the node's model_type list"]
    node = ", ".join(f"{name}={value}" for name, value in inputs.items())
    return f'{comment(notes)}{TABLE}["{key}"] = {chosen.only}\n# node inputs: {node}\n'


def read(text: str) -> Carried:
    key, coefficients = read_item(text, TABLE)
    threshold = first = last = None
    if match := _INPUTS.search(text):
        threshold, first, last = (_float(part) for part in match.groups())
    return Carried(
        coefficients={"transformer": number_list(coefficients, "coefficients")},
        sign_rule=_sign_rule(key),
        threshold=threshold,
        start=first or None,
        end=None if last is None else round(1.0 - last, 12) or None,
    )


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise EngineError(f"node inputs: {text!r}, expected a number") from None


def _sign_rule(model_type: str) -> str:
    return "abs" if "flux" in model_type else "signed"


def _model_type(entry: Entry, family: str) -> str:
    """A key that the node sends to this family's code: it looks for the families' names anywhere in the key."""
    name = entry.model.rpartition("/")[2]
    if any(mark in name for mark in FAMILIES.values() if mark != family):
        name = f"v{entry.version}"
    ret_mode = "_ret_mode" if family == "wan2.1" and projected(entry) else ""
    return f"{family}_{name}{ret_mode}"


def _start(entry: Entry) -> float:
    """Share of the schedule from which the node may skip; the first step computes whatever it is."""
    if entry.start is None or isinstance(entry.start, float):
        return float(entry.start or 0)
    return 0.0 if entry.start <= 1 else steps(entry, entry.start, 1) / _num_steps(entry)


def _end(entry: Entry) -> float:
    """Share of the schedule up to which the node may skip."""
    if not entry.end or isinstance(entry.end, float):
        return 1.0 - (entry.end or 0.0)
    if entry.end == 1 and entry.protocol.num_steps is None:
        return 1.0
    return max(0.0, (_num_steps(entry) - entry.end - 1) / _num_steps(entry))


def _num_steps(entry: Entry) -> int:
    if entry.protocol.num_steps is None:
        raise EngineError(
            f"{entry.label}: always computes a number of steps, but of how many is not known"
        )
    return entry.protocol.num_steps
