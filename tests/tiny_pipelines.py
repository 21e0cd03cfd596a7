"""Real diffusers pipelines at a size that runs in milliseconds: real components, random weights, nothing downloaded.

The denoisers come from the zoo. Text encoders are left out and prompt embeddings are given instead, which every
pipeline accepts. Each builder returns a :class:`Case`; ``case.run()`` generates and returns the latents.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import zoo
from PIL import Image

STEPS = 6


@dataclass
class Case:
    """A pipeline, the arguments of one generation, and what its calls look like.

    Attributes:
        branches: Names that the runtime gives to the calls of one step, in their order.
        evaluations: Denoiser steps of one generation (second-order solvers evaluate nearly twice as often).
        exit: The module that the block stack's result enters, read off the class's code.
    """

    pipe: Any
    arguments: dict[str, Any]
    branches: tuple[str, ...]
    evaluations: int = STEPS
    output: str = "images"
    exit: str = "norm_out"
    latent: dict[str, Any] = field(default_factory=lambda: {"output_type": "latent"})

    def run(self, seed: int = 0, **changes: Any) -> torch.Tensor:
        """The latents of one generation; ``changes`` replace arguments."""
        arguments = {**self.arguments, **self.latent, **changes}
        result = self.pipe(**arguments, generator=torch.Generator().manual_seed(seed))
        return torch.as_tensor(getattr(result, self.output))

    @property
    def experts(self) -> dict[str, torch.nn.Module]:
        names = ("transformer", "transformer_2")
        return {
            name: module
            for name in names
            if (module := self.pipe.components.get(name)) is not None
        }

    @property
    def transformer(self) -> torch.nn.Module:
        return self.pipe.transformer


class Reference:
    """A cached generation by other means: plain torch hooks, all blocks run on every call.

    A call that is to be skipped gets, at the stack's exit, its own input of the stack plus the residual that the last
    computed call *of the same branch and expert in this generation* left; which branch a call belongs to is told from
    the values of its text embeddings, so nothing here depends on how the runtime finds out.

    Args:
        case: The pipeline.
        skips: ``skips(call, first)`` says whether to skip; ``call`` counts the calls of the branch in this generation,
            over all experts, and ``first`` says that the expert has not computed this branch yet.
    """

    def __init__(self, case: Case, skips: Callable[[int, bool], bool]) -> None:
        self.skips, self.handles = skips, []
        self.begin()
        for expert, model in case.experts.items():
            modules = dict(model.named_modules())
            head = modules[zoo.TINY[ZOO_NAME[type(model).__name__]].blocks[0]][0]
            self.handles += [
                model.register_forward_pre_hook(self._called(expert), with_kwargs=True),
                head.register_forward_pre_hook(self._entered, with_kwargs=True),
                modules[case.exit].register_forward_pre_hook(self._left),
                model.register_forward_hook(self._returned),
            ]

    def begin(self) -> None:
        """A new generation: nothing of the last one may be used."""
        self.texts: list[torch.Tensor] = []
        self.calls: dict[int, int] = {}
        self.residuals: dict[tuple[str, int], torch.Tensor] = {}
        self.outputs: dict[tuple[str, int], list[torch.Tensor]] = {}
        self.exits: dict[tuple[str, int], list[torch.Tensor]] = {}

    def __enter__(self) -> "Reference":
        return self

    def __exit__(self, *exc: object) -> None:
        while self.handles:
            self.handles.pop().remove()

    def _called(self, expert: str) -> Callable:
        def hook(model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            text = (
                kwargs["encoder_hidden_states"]
                if "encoder_hidden_states" in kwargs
                else kwargs["class_labels"]
            )
            known = [
                i
                for i, t in enumerate(self.texts)
                if t.shape == text.shape and torch.equal(t, text)
            ]
            if not known:
                self.texts.append(text.clone())
            branch = known[0] if known else len(self.texts) - 1
            call = self.calls.get(branch, 0)
            self.calls[branch] = call + 1
            self.key = (expert, branch)
            self.skip = self.skips(call, self.key not in self.residuals)

        return hook

    def _entered(self, block: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self.entry = (
            kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        ).clone()

    def _left(self, module: torch.nn.Module, args: tuple) -> tuple | None:
        self.exits.setdefault(self.key, []).append(args[0].clone())
        if self.skip:
            return ((self.entry + self.residuals[self.key]).to(args[0].dtype), *args[1:])
        self.residuals[self.key] = args[0].to(self.entry.dtype) - self.entry
        return None

    def _returned(self, model: torch.nn.Module, args: tuple, output: Any) -> None:
        self.outputs.setdefault(self.key, []).append(output[0].clone())


ZOO_NAME = {tiny.cls: name for name, tiny in reversed(zoo.TINY.items())}


def embeds(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flow_match(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def autoencoder(channels: int, **config: Any) -> Any:
    """An image autoencoder that halves the size once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return diffusers.AutoencoderKL(
            latent_channels=channels,
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            layers_per_block=1,
            shift_factor=0.1,
            scaling_factor=0.5,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **config,
        ).eval()


def longcat_image() -> Case:
    """Two calls per step, named by ``cache_context``."""
    transformer = zoo.build("longcat_image", in_channels=64, joint_attention_dim=32)
    pipe = diffusers.LongCatImagePipeline(
        flow_match(), autoencoder(16), None, None, None, transformer
    )

    def encode(prompt: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The embedding of a prompt, as the text encoder would give: the pipeline takes no embeddings alone."""
        words = [prompt] if isinstance(prompt, str) else list(prompt)
        ids = torch.zeros(7, 3)
        return torch.cat([embeds(1, 7, 32, seed=len(word)) for word in words]), ids

    pipe.encode_prompt = encode
    arguments = dict(
        prompt="a seven",
        negative_prompt="",
        height=16,
        width=16,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        enable_prompt_rewrite=False,
    )
    return Case(quiet(pipe), arguments, ("cond", "uncond"))


def flux(scheduler: Any = None) -> Case:
    """Two calls per step, named by ``cache_context``, with true guidance."""
    transformer = zoo.build("flux", in_channels=16)
    pipe = diffusers.FluxPipeline(
        scheduler or flow_match(), autoencoder(4), None, None, None, None, transformer
    )
    arguments = dict(
        prompt_embeds=embeds(1, 6, 32),
        pooled_prompt_embeds=embeds(1, 32, seed=2),
        negative_prompt_embeds=embeds(1, 6, 32, seed=3),
        negative_pooled_prompt_embeds=embeds(1, 32, seed=4),
        true_cfg_scale=2.0,
        height=16,
        width=16,
        num_inference_steps=STEPS,
    )
    return Case(quiet(pipe), arguments, ("cond", "uncond"))


def flux_img2img(like: Case | None = None, **components: Any) -> Case:
    """The last part of the schedule, two unnamed calls per step; ``like`` shares its components."""
    like = like or flux()
    pipe = diffusers.FluxImg2ImgPipeline(**{**like.pipe.components, **components})
    arguments = dict(
        like.arguments, image=embeds(1, 3, 16, 16, seed=5).clamp(-1, 1), strength=0.7
    )
    return Case(quiet(pipe), arguments, ("branch0", "branch1"), evaluations=5)


def qwen_image_edit_plus() -> Case:
    """``zero_cond_t`` with a reference image; no vision processor, which needs torchvision: embeddings are given."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    transformer = zoo.build("qwen_image_zero_cond_t")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        vae = diffusers.AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ).eval()
    pipe = diffusers.QwenImageEditPlusPipeline(
        flow_match(), vae, None, None, None, transformer
    )
    # Sizes to which reference images are brought; a million pixels otherwise.
    module.CONDITION_IMAGE_SIZE, module.VAE_IMAGE_SIZE = 32 * 32, 32 * 32
    arguments = dict(
        image=[Image.new("RGB", (32, 32), (200, 30, 90))],
        prompt_embeds=embeds(1, 7, 16),
        negative_prompt_embeds=embeds(1, 5, 16, seed=2),
        true_cfg_scale=3.0,
        height=16,
        width=16,
        num_inference_steps=STEPS,
    )
    return Case(quiet(pipe), arguments, ("cond", "uncond"))


def _wan(**components: Any) -> Case:
    components = {"transformer_2": None, **components}
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.WanPipeline(None, None, None, scheduler, **components)
    arguments = dict(
        prompt_embeds=embeds(1, 9, 16),
        negative_prompt_embeds=embeds(1, 9, 16, seed=2),
        guidance_scale=3.0,
        height=64,
        width=64,
        num_frames=5,
        num_inference_steps=STEPS,
    )
    return Case(quiet(pipe), arguments, ("cond", "uncond"), output="frames")


def wan21() -> Case:
    return _wan(transformer=zoo.build("wan21"))


def wan22() -> Case:
    """Two experts: the first works above the boundary of 0.875, the second below it."""
    return _wan(
        transformer=zoo.build("wan21"),
        transformer_2=zoo.build("wan21", seed=1),
        boundary_ratio=0.875,
    )


def chroma() -> Case:
    """Two unnamed calls per step."""
    transformer = zoo.build("chroma", in_channels=16)
    pipe = diffusers.ChromaPipeline(flow_match(), autoencoder(4), None, None, transformer)
    arguments = dict(
        prompt_embeds=embeds(1, 6, 32),
        prompt_attention_mask=torch.ones(1, 6),
        negative_prompt_embeds=embeds(1, 6, 32, seed=3),
        negative_prompt_attention_mask=torch.ones(1, 6),
        guidance_scale=3.0,
        height=16,
        width=16,
        num_inference_steps=STEPS,
    )
    return Case(quiet(pipe), arguments, ("branch0", "branch1"))


def lumina2() -> Case:
    """Two unnamed calls per step, a timestep that rises, and guidance that may end early (``cfg_trunc_ratio``)."""
    pipe = diffusers.Lumina2Pipeline(
        zoo.build("lumina2"), flow_match(), autoencoder(4), None, None
    )
    arguments = dict(
        prompt_embeds=embeds(1, 6, 32),
        prompt_attention_mask=torch.ones(1, 6, dtype=torch.long),
        negative_prompt_embeds=embeds(1, 6, 32, seed=3),
        negative_prompt_attention_mask=torch.ones(1, 6, dtype=torch.long),
        guidance_scale=3.0,
        height=64,
        width=64,
        num_inference_steps=STEPS,
    )
    return Case(quiet(pipe), arguments, ("branch0", "branch1"))


def sd3(scheduler: Any = None) -> Case:
    """One batched call per step; skip-layer guidance adds a call of half the batch."""
    components = dict.fromkeys(
        [
            "text_encoder",
            "tokenizer",
            "text_encoder_2",
            "tokenizer_2",
            "text_encoder_3",
            "tokenizer_3",
        ]
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=zoo.build("sd3"),
        scheduler=scheduler or flow_match(),
        vae=autoencoder(4),
        **components,
    )
    arguments = dict(
        prompt_embeds=embeds(1, 6, 32),
        pooled_prompt_embeds=embeds(1, 64, seed=2),
        negative_prompt_embeds=embeds(1, 6, 32, seed=3),
        negative_pooled_prompt_embeds=embeds(1, 64, seed=4),
        guidance_scale=3.0,
        height=16,
        width=16,
        num_inference_steps=STEPS,
    )
    return Case(quiet(pipe), arguments, ("branch0",))


def sd3_heun() -> Case:
    """A solver of second order: all steps but the last evaluate the denoiser twice."""
    case = sd3(diffusers.FlowMatchHeunDiscreteScheduler())
    case.evaluations = 2 * STEPS - 1
    return case


def pixart() -> Case:
    """One batched call per step."""
    pipe = diffusers.PixArtAlphaPipeline(
        None,
        None,
        autoencoder(4),
        zoo.build("pixart"),
        diffusers.DPMSolverMultistepScheduler(),
    )
    arguments = dict(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=embeds(1, 6, 8),
        prompt_attention_mask=torch.ones(1, 6),
        negative_prompt_embeds=embeds(1, 6, 8, seed=3),
        negative_prompt_attention_mask=torch.ones(1, 6),
        guidance_scale=3.0,
        height=16,
        width=16,
        num_inference_steps=STEPS,
        use_resolution_binning=False,
    )
    return Case(quiet(pipe), arguments, ("branch0",))


def stable_audio() -> Case:
    """Audio; one batched call per step."""
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        vae = diffusers.AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=[2, 2],
            channel_multiples=[1, 1],
            decoder_channels=2,
            decoder_input_channels=3,
            audio_channels=2,
            sampling_rate=16,
        ).eval()
        projection = StableAudioProjectionModel(4, 4, 0, 32).eval()
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        solver_order=2, prediction_type="v_prediction"
    )
    pipe = diffusers.StableAudioPipeline(
        vae, None, projection, None, zoo.build("stable_audio"), scheduler
    )
    arguments = dict(
        prompt_embeds=embeds(1, 3, 4),
        negative_prompt_embeds=embeds(1, 3, 4, seed=2),
        attention_mask=torch.ones(1, 3),
        negative_attention_mask=torch.ones(1, 3),
        audio_end_in_s=2.0,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
    )
    return Case(
        quiet(pipe),
        arguments,
        ("branch0",),
        output="audios",
        exit="proj_out",
        latent={"output_type": "pt"},
    )


def dit() -> Case:
    """A scheduler without a step counter (DDIM), batched guidance."""
    vae = autoencoder(4)
    pipe = diffusers.DiTPipeline(
        zoo.build("dit", num_embeds_ada_norm=1000), vae, diffusers.DDIMScheduler()
    )
    arguments = dict(class_labels=[3], guidance_scale=3.0, num_inference_steps=STEPS)
    return Case(quiet(pipe), arguments, ("branch0",), latent={"output_type": "np"})


CASES: dict[str, Callable[[], Case]] = {
    build.__name__: build
    for build in (
        longcat_image,
        flux,
        flux_img2img,
        qwen_image_edit_plus,
        wan21,
        wan22,
        chroma,
        lumina2,
        sd3,
        sd3_heun,
        pixart,
        stable_audio,
        dit,
    )
}
