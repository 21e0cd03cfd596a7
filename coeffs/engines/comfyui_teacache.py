"""ComfyUI-TeaCache: a line of the table in ``nodes.py`` and the inputs of the node.

The node picks its code by parts of ``model_type``: FLUX takes predictions absolute, the others keep their sign. Steps
outside ``start_percent`` to ``end_percent`` of the schedule compute.
"""

import re

from coeffs.engines.releases import projected
from coeffs.engines.setting import Carried, Request, setting
from coeffs.engines.text import comment, literal, value_of
from coeffs.entry.fields import Numbers
from coeffs.entry.schema import Entry
from coeffs.errors import EngineError

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
_LINE = re.compile(TABLE + r'\["([^"\]]*)"\] = (\[[^\]]*\])')
_INPUTS = re.compile("(rel_l1_thresh|start_percent|end_percent)=([0-9.e+-]+)")


def write(request: Request) -> str:
    entry = request.entry
    family = FAMILIES.get(
        entry.transformer_class or "", "flux"
    )  # unknown ones only with --force
    chosen = setting(request, _sign_rule(family))
    key = _model_type(entry, family)
    start, end = _window(entry)
    request.notes.append("append to nodes.py, and add the key to the node's model_type list")
    return (
        f'{comment(request.notes)}{TABLE}["{key}"] = {chosen.only}\n# node inputs: model_type="{key}", '
        f"rel_l1_thresh={chosen.threshold}, start_percent={start}, end_percent={end}\n"
    )


def read(text: str) -> Carried:
    line = _LINE.search(text)
    if line is None:
        raise EngineError(f'no {TABLE}["..."] = [...]: expected it as the export writes it')
    form = {name: literal(value) for name, value in _INPUTS.findall(text)}
    form["coefficients"] = literal(line[2])
    start, end = (
        value_of(form, f"{edge}_percent", float | None) for edge in ("start", "end")
    )
    return Carried(
        coefficients={"transformer": value_of(form, "coefficients", Numbers)},
        sign_rule=_sign_rule(line[1]),
        threshold=value_of(form, "rel_l1_thresh", float | None),
        start=start or None,
        end=None if end is None else round(1.0 - end, 12) or None,
    )


def _sign_rule(model_type: str) -> str:
    return "abs" if "flux" in model_type else "signed"


def _model_type(entry: Entry, family: str) -> str:
    """A key that the node sends to this family's code: it looks for the families' names anywhere in the key."""
    name = entry.model.rpartition("/")[2]
    if any(mark in name for mark in FAMILIES.values() if mark != family):
        name = f"v{entry.version}"
    ret_mode = "_ret_mode" if family == "wan2.1" and projected(entry) else ""
    return f"{family}_{name}{ret_mode}"


def _window(entry: Entry) -> tuple[float, float]:
    """Shares of the schedule between which the node may skip; the first step computes whatever they are."""
    start, end, steps = entry.start or 0, entry.end or 0, entry.protocol.num_steps
    if steps is None and any(isinstance(edge, int) and edge > 1 for edge in (start, end)):
        raise EngineError(
            f"{entry.label}: always computes a number of steps, but of how many is not known"
        )
    if isinstance(start, int):
        start = start / steps if steps and start > 1 else 0.0
    if isinstance(end, float):
        return start, 1.0 - end
    return start, max(0.0, (steps - end - 1) / steps) if steps and end else 1.0
