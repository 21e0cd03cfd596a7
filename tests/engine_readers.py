"""What engines make of a form, by their own rules.

Each ``*_reads`` function follows what the named public file does with a setting; the docstring says at which
commit it was read. They return what the engine will then use: predicted change as a function of x, threshold, window.
"""

import ast
import json
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import yaml
from coeffs_samples import sample_entry

import coeffs
from coeffs.engines.releases import releases


def entry_for(engine: str, **changes: object) -> coeffs.Entry:
    """The sample entry for the first class of the engine's table, fitted on the signal compared there."""
    release = releases().get(engine)
    facts: dict = {"engine": engine}
    if release is not None and release.known:
        cls = (
            "WanTransformer3DModel"
            if "WanTransformer3DModel" in release.known
            else release.known[0]
        )
        signal = release.signals.get(cls, "modulated_input")
        facts |= {"transformer_class": cls, "signal": signal}
    if release is not None and release.calls == "one":
        cond = sample_entry().experts["transformer"].mag_ratios["cond"]
        facts["experts"] = {"transformer": coeffs.Expert(mag_ratios={"pooled": cond})}
    return sample_entry(**facts | changes)


@dataclass
class Used:
    """What an engine makes of a setting."""

    predict: Callable[[float], float]
    threshold: float
    first: int = 1
    last: int = 0


def vllm_omni_reads(text: str) -> Used:
    """vLLM-Omni, ``diffusion/data.py``, ``cache/teacache/{config,hook}.py`` at
    be81443c8a52f863452253ee6ea1d9f263bd2fb6.

    ``--cache-config`` is JSON; a text that is none is dropped in silence, so no comment may stand before it. Unknown
    keys are set aside. The threshold must be positive, the coefficients exactly five;
    ``abs(np.poly1d(c)(x))`` accumulates.
    """
    form = json.loads(text)
    assert isinstance(form, dict)
    known = {
        key: value for key, value in form.items() if key in ("rel_l1_thresh", "coefficients")
    }
    assert known["rel_l1_thresh"] > 0
    assert len(known["coefficients"]) == 5
    polynomial = np.poly1d(known["coefficients"])
    return Used(lambda x: abs(float(polynomial(x))), known["rel_l1_thresh"])


def sglang_reads(text: str, num_steps: int = 28) -> Used:
    """SGLang 0.5.23, ``configs/sample/teacache.py``.

    A dataclass without validation; ``np.poly1d(c)(x)`` accumulates with its sign. Float windows are fractions,
    negative whole numbers count from the end.
    """
    fields = {
        "teacache_thresh",
        "start_skipping",
        "end_skipping",
        "coefficients",
        "use_ret_steps",
    }
    (call,) = [node.value for node in ast.parse(text).body]
    assert call.func.id == "TeaCacheParams"
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert set(given) <= fields

    def boundary(value: int | float) -> int:
        if isinstance(value, float):
            return int(num_steps * value)
        return num_steps + value if value < 0 else value

    polynomial = np.poly1d(given["coefficients"])
    last = num_steps - boundary(given["end_skipping"])
    first = boundary(given["start_skipping"])
    return Used(lambda x: float(polynomial(x)), given["teacache_thresh"], first, last)


def mlx_teacache_reads(text: str) -> Used:
    """mlx-teacache 0.14.1, ``api.py`` and ``_kernel/gate.py``: five floats, threshold in 0 to 1, clamped at 0."""
    (call,) = [node.value for node in ast.parse(text).body]
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert call.func.id == "apply_teacache" and len(given["coefficients"]) == 5
    assert 0 < given["rel_l1_thresh"] <= 1
    polynomial = np.poly1d(given["coefficients"])
    window = given["skip_first_n_steps"], given["skip_last_n_steps"]
    return Used(lambda x: max(0.0, float(polynomial(x))), given["rel_l1_thresh"], *window)


def tensorrt_llm_reads(text: str, second: bool = False) -> Used:
    """TensorRT-LLM, ``_torch/visual_gen`` and its public arguments, ``cache/teacache.py`` at
    aaedbf926586258a1d179660c2b4b50e9c1f85a7.

    ``yaml.safe_load`` of a mapping, unknown keys forbidden, ``cache_backend`` discriminates, the threshold is above 0
    and the lists are not empty. ``abs(np.poly1d(c)(x))`` accumulates, capped at twice the threshold. ``use_ret_steps``
    computes the first 5 steps, without it the first and the last compute.
    """
    form = yaml.safe_load(text)
    assert set(form) == {"cache_config"}
    config = form["cache_config"]
    assert config.pop("cache_backend") == "teacache"
    assert set(config) <= {
        "teacache_thresh",
        "use_ret_steps",
        "coefficients",
        "coefficients_2",
    }
    assert isinstance(config["teacache_thresh"], float) and config["teacache_thresh"] > 0
    assert isinstance(config["use_ret_steps"], bool)
    for key in ("coefficients", "coefficients_2"):
        assert key not in config or (
            config[key] and all(isinstance(value, float) for value in config[key])
        )
    polynomial = np.poly1d(config["coefficients_2" if second else "coefficients"])
    first, last = (5, 0) if config["use_ret_steps"] else (1, 1)
    return Used(lambda x: abs(float(polynomial(x))), config["teacache_thresh"], first, last)


def lightx2v_reads(text: str, wan: bool) -> Used:
    """LightX2V, ``utils/set_config.py`` and the ``feature_caching/transformer_infer.py`` of Wan and HunyuanVideo at
    f8aee98b5462cca8d7288888146ebd95592bf266.

    The JSON file is merged into the configuration with whatever keys it has. Wan takes list 0 with ``use_ret_steps``
    (first 5 steps compute), list 1 without (first and last compute); HunyuanVideo takes the list as it is.
    ``np.poly1d(c)(x)`` accumulates with its sign.
    """
    config = json.loads(text)
    assert config["feature_caching"] == "Tea"
    first, last = 1, 1
    coefficients = config["coefficients"]
    if wan:
        coefficients = coefficients[0] if config["use_ret_steps"] else coefficients[1]
        first, last = (5, 0) if config["use_ret_steps"] else (1, 1)
    polynomial = np.poly1d(coefficients)
    return Used(lambda x: float(polynomial(x)), config["teacache_thresh"], first, last)


def comfyui_reads(text: str, num_steps: int = 28) -> Used:
    """ComfyUI-TeaCache, ``nodes.py`` at 91dff8e31684ca70a5fda309611484402d8fa192.

    A table from ``model_type`` to a list, evaluated by powers; code is chosen by parts of the key, in this order; FLUX
    takes the absolute value. A step computes unless ``start_percent <= step / steps <= end_percent``.
    """
    table: dict = {}
    exec(
        compile(text, "nodes.py", "exec"),
        {"SUPPORTED_MODELS_COEFFICIENTS": table, "__builtins__": {}},
    )
    ((key, coefficients),) = table.items()
    inputs = dict(
        part.split("=")
        for part in text.splitlines()[-1].removeprefix("# node inputs: ").split(", ")
    )
    assert json.loads(inputs["model_type"]) == key
    family = next(
        mark
        for mark in ("flux", "lumina_2", "hidream_i1", "ltxv", "hunyuan_video", "wan2.1")
        if mark in key
    )
    values = [
        float(inputs[name]) for name in ("rel_l1_thresh", "start_percent", "end_percent")
    ]
    active = [values[1] <= step / num_steps <= values[2] for step in range(num_steps)]

    def predict(x: float) -> float:
        value = sum(
            coefficient * x ** (len(coefficients) - 1 - place)
            for place, coefficient in enumerate(coefficients)
        )
        return abs(value) if family == "flux" else value

    first = active.index(True)
    return Used(
        predict, values[0], max(first, 1), num_steps - 1 - max(np.flatnonzero(active))
    )


def magcache_reads(text: str) -> dict[str, dict]:
    """diffusers, ``hooks/mag_cache.py`` at 58eb52c0803ea9af3abec60841c2a093bdf1f951.

    ``MagCacheConfig`` needs ratios unless it calibrates; they are indexed by step and interpolated to
    ``num_inference_steps`` when their number differs.
    """
    found = {}
    for node in ast.parse(text).body:
        assert node.value.func.id == "MagCacheConfig"
        given = {
            keyword.arg: ast.literal_eval(keyword.value) for keyword in node.value.keywords
        }
        assert set(given) <= {
            "threshold",
            "max_skip_steps",
            "retention_ratio",
            "num_inference_steps",
            "mag_ratios",
            "calibrate",
        }
        assert len(given["mag_ratios"]) == given["num_inference_steps"]
        found[node.targets[0].id] = given
    return found


def mag_cache_runs(ratios: list, threshold: float, cap: int, retention: float) -> str:
    """The pattern that MagCache executes: ``MagCacheHeadHook`` of diffusers, and the same rule elsewhere."""
    pattern, product, error, skipped = "", 1.0, 0.0, 0
    for step, ratio in enumerate(ratios):
        product, skipped = product * ratio, skipped + 1
        error += abs(1.0 - product)
        skip = step >= int(retention * len(ratios) + 0.5) and step > 0
        if skip and error <= threshold and skipped <= cap:
            pattern += "S"
        else:
            pattern, product, error, skipped = pattern + "C", 1.0, 0.0, 0
    return pattern


def plan_of(engine: str, text: str) -> str:
    """The pattern that the engine will execute, by its own rules."""
    lines = "".join(line for line in text.splitlines(True) if not line.startswith("#"))
    if engine == "cache-dit-mask":
        config = yaml.safe_load(text)["cache_config"]
        assert (
            config["Fn_compute_blocks"] == 1
            and config["steps_computation_policy"] == "static"
        )
        assert len(config["steps_computation_mask"]) == config["num_inference_steps"]
        return "".join("SC"[step] for step in config["steps_computation_mask"])
    if engine == "angelslim":
        config = yaml.safe_load(text)["cache"]
        return "".join(
            "SC"[step in config["no_cache_steps"]] for step in range(config["num_steps"])
        )
    if engine == "xfuser":
        words = shlex.split(lines)
        config = json.loads(words[words.index("--cache_config") + 1])
        assert config["scm_policy"] is None and config["steps_computation_policy"] == "static"
        return "".join("SC"[step] for step in config["steps_computation_mask"])
    if engine == "sglang-cache-dit":
        words = shlex.split(lines)
        config = json.loads(words[words.index("--cache-dit-params") + 1])
        assert config["scm_policy"] == "static"
        bins = zip_longest(config["scm_compute_bins"], config["scm_cache_bins"], fillvalue=0)
        return "".join("C" * computed + "S" * cached for computed, cached in bins)
    if engine == "diffusers-magcache":
        (config,) = magcache_reads(text).values()
        settings = (
            config.get("threshold", 0.06),
            config["max_skip_steps"],
            config["retention_ratio"],
        )
        return mag_cache_runs(config["mag_ratios"], *settings)
    config = json.loads(text)
    if engine == "vllm-omni-magcache":
        assert 0 < config["mag_retention_ratio"] < 1 and config["mag_max_skip_steps"] > 0
        settings = 0.24, config["mag_max_skip_steps"], config["mag_retention_ratio"]
        return mag_cache_runs(config["mag_ratios"], *settings)
    assert engine == "lightx2v-magcache" and config["magcache_calibration"] is False
    settings = (config[f"magcache_{name}"] for name in ("thresh", "K", "retention_ratio"))
    cond, uncond = config["magcache_ratios"]
    assert cond == uncond and len(cond) == config["infer_steps"]
    return mag_cache_runs(cond, *settings)


def agrees(used: Used, entry: coeffs.Entry, expert: str = "transformer") -> bool:
    """The engine predicts what the entry predicts, everywhere on the entry's domain."""
    fit = entry.fit(expert)
    polynomial = fit.polynomial(entry.sign_rule)
    low, high = fit.domain or (0.0, 0.5)
    grid = [low + (high - low) * step / 200 for step in range(201)]
    return all(
        math.isclose(used.predict(x), polynomial.predict(x), rel_tol=1e-9, abs_tol=1e-9)
        for x in grid
    )
