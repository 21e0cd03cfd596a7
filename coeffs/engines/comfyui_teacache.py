"""ComfyUI-TeaCache: a line of the table in ``nodes.py`` and the inputs of the node.

The node picks its code by parts of ``model_type``: FLUX takes predictions absolute, the others keep their sign; Wan,
Lumina 2 and HiDream-I1-Full compare the time embedding, FLUX, LTX-Video and HunyuanVideo the modulated input. Steps
outside ``start_percent`` to ``end_percent`` of the schedule compute.
"""

import re

from coeffs.engines.setting import Carried, Request, comment, flow, number_list, setting, steps
from coeffs.engines.text import read_item
from coeffs.entry.schema import Entry
from coeffs.errors import EngineError

TABLE = "SUPPORTED_MODELS_COEFFICIENTS"
FAMILIES = {
    "FluxTransformer2DModel": ("flux", "modulated_input"),
    "LTXVideoTransformer3DModel": ("ltxv", "modulated_input"),
    "HunyuanVideoTransformer3DModel": ("hunyuan_video", "modulated_input"),
    "Lumina2Transformer2DModel": ("lumina_2", "time_embedding"),
    "HiDreamImageTransformer2DModel": ("hidream_i1_full", "time_embedding"),
    "WanTransformer3DModel": ("wan2.1", "time_embedding"),
}
_INPUTS = re.compile(
    r"# node inputs: .*rel_l1_thresh=([0-9.e+-]+), start_percent=([0-9.e+-]+), end_percent=([0-9.e+-]+)"
)


def write(request: Request) -> str:
    entry = request.entry
    family, signal = FAMILIES.get(entry.transformer_class or "", (None, None))
    if family is None:
        raise EngineError(
            f"{entry.label} is for {entry.transformer_class}: ComfyUI-TeaCache has no code for that class"
        )
    if entry.signal != signal:
        raise EngineError(
            f"{entry.label} was fitted on the {entry.signal}, ComfyUI-TeaCache compares the {signal} there: fit the "
            f"run again with `calibrate fit RUN --signal {signal}`"
        )
    found = setting(request, "comfyui-teacache", sign_rule=_sign_rule(family))
    (fit,) = found.fits.values()
    key = _model_type(entry, family)
    first, last = _percents(entry)
    return (
        f"{comment(found.notes)}# append to nodes.py, and add the key to the model_type list of the TeaCache node\n"
        f'{TABLE}["{key}"] = {flow(fit.coefficients_high_to_low)}\n'
        f'# node inputs: model_type="{key}", rel_l1_thresh={found.threshold!r}, start_percent={first!r}, '
        f"end_percent={last!r}\n"
    )


def read(text: str) -> Carried:
    key, coefficients = read_item(text, TABLE)
    carried = {
        "coefficients": {"transformer": number_list(coefficients, "coefficients")},
        "sign_rule": _sign_rule(key),
    }
    if match := _INPUTS.search(text):
        threshold, first, last = map(_float, match.groups())
        carried |= {
            "threshold": threshold,
            "start": first or None,
            "end": round(1.0 - last, 12) or None,
        }
    return Carried(**carried)


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
    if any(mark in name for mark, _ in FAMILIES.values() if mark != family):
        name = f"v{entry.version}"
    return f"{family}_{name}" + ("_ret_mode" if _projected(entry) else "")


def _projected(entry: Entry) -> bool:
    return entry.transformer_class == "WanTransformer3DModel" and "projected" in (
        entry.signal_note or ""
    )


def _percents(entry: Entry) -> tuple[float, float]:
    """Share of the schedule between which the node may skip; the first step computes whatever they are."""
    return _start(entry), _end(entry)


def _start(entry: Entry) -> float:
    if entry.start is None or isinstance(entry.start, float):
        return float(entry.start or 0)
    return 0.0 if entry.start <= 1 else steps(entry, entry.start, 1) / _num_steps(entry)


def _end(entry: Entry) -> float:
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
