"""The engines' own parsers, taken out of their wheels: only the named definitions run, none of the heavy imports.

Each parser takes an exported text and raises whatever the engine raises for one that it does not accept; those of
plans return the steps that the engine will compute, 1 or 0.
"""

import ast
import dataclasses
import importlib.util
import json
import logging
import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from torch import nn

Parser = Callable[[str], list[int] | None]


def definitions(path: Path, names: tuple[str, ...], **known: Any) -> dict[str, Any]:
    """Run the named classes, functions and assignments of a file, with ``known`` in place of its imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = [node for node in tree.body if set(names) & set(_defines(node))]
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    module = ast.fix_missing_locations(ast.Module([future, *body], []))
    scope: dict[str, Any] = {
        "__name__": path.stem,
        "dataclasses": dataclasses,
        "json": json,
        "Any": Any,
    }
    scope |= {name: getattr(dataclasses, name) for name in ("dataclass", "field", "fields")}
    scope |= {"logger": logging.getLogger(path.stem)} | known
    sys.modules.setdefault(
        path.stem, types.ModuleType(path.stem)
    )  # dataclasses look their module up
    exec(compile(module, str(path), "exec"), scope)
    return scope


def _defines(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def call_arguments(text: str) -> dict[str, Any]:
    """Keyword arguments of the one call in Python text."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return {word.arg: ast.literal_eval(word.value) for word in calls[0].keywords if word.arg}


def option(text: str, name: str) -> str:
    words = shlex.split(text, comments=True)
    return words[words.index(name) + 1]


# --- TeaCache ---------------------------------------------------------------------------------------


def vllm_omni(root: Path) -> Parser:
    diffusion = root / "vllm_omni" / "diffusion"
    config = definitions(diffusion / "data.py", ("DiffusionCacheConfig",))[
        "DiffusionCacheConfig"
    ]
    names = (
        "_MODEL_COEFFICIENTS",
        "_DEFAULT_REL_L1_THRESH",
        "_MODEL_DEFAULT_REL_L1_THRESH",
        "TeaCacheConfig",
    )
    tea = definitions(diffusion / "cache/teacache/config.py", names)["TeaCacheConfig"]

    def parse(text: str) -> None:
        given = config.from_dict(json.loads(text))
        tea(rel_l1_thresh=given.rel_l1_thresh, coefficients=given.coefficients)
        assert set(given._extra_params) <= {"_comment"}, given._extra_params

    return parse


def sglang(root: Path) -> Parser:
    sample = root / "sglang/multimodal_gen/configs/sample"
    base = definitions(sample / "sampling_params.py", ("CacheParams",))["CacheParams"]
    params = definitions(sample / "teacache.py", ("TeaCacheParams",), CacheParams=base)[
        "TeaCacheParams"
    ]

    def parse(text: str) -> None:
        params(**call_arguments(text)).get_skip_step_range(50)

    return parse


def mlx_teacache(root: Path) -> Parser:
    sys.path.insert(0, str(root))
    from mlx_teacache._kernel.coefficients import validate_custom
    from mlx_teacache._kernel.window import check_step_window, validate_step_count

    def parse(text: str) -> None:
        given = call_arguments(text)
        assert set(given) <= {
            "rel_l1_thresh",
            "coefficients",
            "skip_first_n_steps",
            "skip_last_n_steps",
        }
        validate_custom(given["coefficients"])
        assert 0.0 < given["rel_l1_thresh"] <= 1.0, given["rel_l1_thresh"]
        window = [
            validate_step_count(name, given[name])
            for name in ("skip_first_n_steps", "skip_last_n_steps")
        ]
        check_step_window(50, skip_first_n_steps=window[0], skip_last_n_steps=window[1])

    return parse


# --- plans ------------------------------------------------------------------------------------------


def cache_dit_mask(root: Path) -> Parser:
    import cache_dit

    def parse(text: str) -> list[int]:
        config = cache_dit.load_configs(yaml.safe_load(text))["cache_config"]
        assert config.steps_computation_policy == "static" and config.Fn_compute_blocks == 1
        assert len(config.steps_computation_mask) == config.num_inference_steps
        return config.steps_computation_mask

    return parse


def sglang_cache_dit(root: Path) -> Parser:
    from cache_dit import steps_mask

    names = (
        *(
            "CACHE_DIT_REQUEST_KNOB_KEYS",
            "CACHE_DIT_REQUEST_SCM_KEYS",
            "CACHE_DIT_REQUEST_PARAM_KEYS",
        ),
        *("get_scm_mask", "resolve_cache_dit_request_overrides"),
    )
    path = root / "sglang/multimodal_gen/runtime/cache/cache_dit_integration.py"
    theirs = definitions(path, names, steps_mask=steps_mask)

    def parse(text: str) -> list[int]:
        given = theirs["resolve_cache_dit_request_overrides"](
            json.loads(option(text, "--cache-dit-params"))
        )
        assert given["scm_policy"] == "static"
        steps = int(option(text, "--num-inference-steps"))
        bins = given["scm_compute_bins"], given["scm_cache_bins"]
        mask: list[int] = theirs["get_scm_mask"]("none", steps, *bins)
        return mask

    return parse


def xfuser(root: Path) -> Parser:
    from cache_dit import DBCacheConfig

    cache = root / "xfuser/model_executor/cache"
    preset = definitions(cache / "presets.py", ("DBCachePreset",), Optional=Any)[
        "DBCachePreset"
    ]
    # The number of ranks that share guidance: one process here.
    ranks = types.ModuleType("xfuser.core.distributed")
    ranks.get_classifier_free_guidance_world_size = lambda: 1  # type: ignore[attr-defined]
    sys.modules |= {"xfuser": ranks, "xfuser.core": ranks, "xfuser.core.distributed": ranks}
    names = (
        "_build_config",
        "_build_calibrator_config",
        "_build_scm_mask",
        "_resolve_enable_separate_cfg",
    )
    build = definitions(cache / "adapters/cache_dit.py", names, DBCachePreset=preset)[
        "_build_config"
    ]

    def parse(text: str) -> list[int]:
        given = option(text, "--cache_config")
        steps = int(option(text, "--num_inference_steps"))
        config, _ = build(steps, preset(scm_policy="ultra"), given, False, DBCacheConfig)
        assert config.steps_computation_policy == "static" and config.Fn_compute_blocks == 1
        mask: list[int] = config.steps_computation_mask
        return mask

    return parse


def angelslim(root: Path) -> Parser:
    path = root / "angelslim/compressor/diffusion/cache/cache_helper.py"
    spec = importlib.util.spec_from_file_location("angelslim_cache_helper", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def parse(text: str) -> list[int]:
        given = yaml.safe_load(text)["cache"]
        helper = module.CacheHelper(no_cache_steps=set(given["no_cache_steps"]))
        computed = []
        for step in range(given["num_steps"]):
            helper.cur_timestep = step
            computed.append(int(not helper.is_skip()))
        return computed

    return parse


class Blocks(nn.Module):
    """Two small FLUX blocks, and which calls computed the second one."""

    def __init__(self) -> None:
        from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

        super().__init__()
        blocks = [FluxTransformerBlock(8, 1, 8) for _ in range(2)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.computed: list[int] = []
        blocks[1].attn.register_forward_pre_hook(lambda *_: self.computed.__setitem__(-1, 1))

    def steps(self, count: int) -> list[int]:
        import torch

        with torch.no_grad():
            for _ in range(count):
                self.computed.append(0)
                text, image = torch.ones(1, 2, 8), torch.ones(1, 4, 8)
                for block in self.transformer_blocks:
                    text, image = block(
                        hidden_states=image,
                        encoder_hidden_states=text,
                        temb=torch.ones(1, 8),
                    )
        return self.computed


def diffusers_magcache(root: Path) -> Parser:
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    def parse(text: str) -> list[int]:
        given = call_arguments(text)
        blocks = Blocks()
        apply_mag_cache(blocks, MagCacheConfig(**given))
        return blocks.steps(given["num_inference_steps"])

    return parse


def vllm_omni_magcache(root: Path) -> Parser:
    diffusion = root / "vllm_omni" / "diffusion"
    config = definitions(diffusion / "data.py", ("DiffusionCacheConfig",))[
        "DiffusionCacheConfig"
    ]
    for name in (
        "",
        ".diffusion",
        ".diffusion.cache",
        ".diffusion.cache.magcache",
        ".diffusion.hooks",
    ):
        package = types.ModuleType(f"vllm_omni{name}")
        package.__path__ = [str(root / package.__name__.replace(".", "/"))]
        sys.modules[package.__name__] = package
    for name in ("vllm", "vllm.logger", "vllm_omni.logger"):
        logger = types.ModuleType(name)
        logger.init_logger = logging.getLogger  # type: ignore[attr-defined]
        sys.modules[name] = logger
    from vllm_omni.diffusion.cache.magcache.config import MagCacheConfig
    from vllm_omni.diffusion.cache.magcache.hook import apply_mag_cache_hook

    def parse(text: str) -> list[int]:
        given = config.from_dict(json.loads(text))
        assert set(given._extra_params) <= {"_comment"}, given._extra_params
        mag = MagCacheConfig(
            threshold=given.mag_threshold,
            max_skip_steps=given.mag_max_skip_steps,
            retention_ratio=given.mag_retention_ratio,
            num_inference_steps=given.num_inference_steps,
            mag_ratios=given.mag_ratios,
        )
        blocks = Blocks()
        apply_mag_cache_hook(blocks, mag)
        return blocks.steps(given.num_inference_steps)

    return parse
