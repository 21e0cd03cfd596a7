"""A pipeline with a real FLUX transformer of a few kilobytes, for verifications that take a second."""

import hashlib
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel


class TinyDecoder(torch.nn.Module):
    """Latents (1, 16, 4) to an image of 16 x 16 pixels."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(torch.randn(4, 3 * 16, generator=generator) / 2)

    def decode(self, latents):
        return (
            (latents @ self.weight)
            .view(1, 4, 4, 4, 4, 3)
            .permute(0, 1, 3, 2, 4, 5)
            .reshape(1, 16, 16, 3)
        )


class TinyPipeline:
    """Called like a pipeline of diffusers: guidance with two announced branches, hooks freed at the end."""

    def __init__(self):
        torch.manual_seed(0)
        self.transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=2, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        ).eval()  # fmt: skip
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.vae = TinyDecoder()
        self.corrupt = False  # makes NaN

    @property
    def components(self):
        return {
            "transformer": self.transformer,
            "scheduler": self.scheduler,
            "vae": self.vae,
        }

    def set_progress_bar_config(self, **options):
        pass

    def maybe_free_model_hooks(self):
        if hasattr(self.transformer, "_reset_stateful_cache"):
            self.transformer._reset_stateful_cache()

    def denoiser(self, time):
        return self.transformer

    @contextmanager
    def _branch(self, denoiser, name):
        with denoiser.cache_context(name):
            yield

    @torch.no_grad()
    def __call__(
        self,
        prompt,
        num_inference_steps=8,
        guidance_scale=2.0,
        generator=None,
        output_type="pil",
    ):
        number = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little")
        text = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(number))
        latents = torch.randn(1, 16, 4, generator=generator)
        ids = torch.zeros(16, 3)
        ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
        self.scheduler.set_timesteps(num_inference_steps)
        for time in self.scheduler.timesteps:
            denoiser, outputs = self.denoiser(time), []
            for name, embedding in (("cond", text), ("uncond", torch.zeros_like(text))):
                with self._branch(denoiser, name):
                    outputs.append(
                        denoiser(
                            hidden_states=latents, encoder_hidden_states=embedding, pooled_projections=embedding[:, 0],
                            timestep=time[None] / 1000, img_ids=ids, txt_ids=torch.zeros(6, 3), return_dict=False,
                        )[0]
                    )  # fmt: skip
            velocity = outputs[1] + guidance_scale * (outputs[0] - outputs[1])
            latents = self.scheduler.step(velocity, time, latents, return_dict=False)[0]
        images = torch.sigmoid(self.vae.decode(latents)).float().numpy()
        self.maybe_free_model_hooks()
        return SimpleNamespace(
            images=np.full_like(images, np.nan) if self.corrupt else images
        )


class TinyExperts(TinyPipeline):
    """Two denoisers: the second takes over below ``boundary``, as in Wan 2.2."""

    boundary = 800

    def __init__(self):
        super().__init__()
        other = TinyPipeline().transformer
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.9)
        self.transformer_2 = other

    @property
    def components(self):
        return super().components | {"transformer_2": self.transformer_2}

    def denoiser(self, time):
        return self.transformer if time >= self.boundary else self.transformer_2


def tiny_session(pipe, **arguments):
    """The pipeline as a loaded session, called with these arguments."""
    from calibrate.model.call import prepare_call
    from calibrate.model.checkpoint import find_checkpoint
    from calibrate.model.session import load_session

    call = prepare_call(type(pipe).__call__, None, pipe_args=arguments)
    return load_session(find_checkpoint(pipe), call)
