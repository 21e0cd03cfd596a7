"""The tiny models' data and batches at other sizes and on another device than those that were published."""

from dataclasses import replace

import pytest
import torch

from training.tiny_longcat_image.data import digit_masks
from training.tiny_sd3 import denoiser as sd3
from training.tiny_sd3.recipe import Recipe as Sd3Recipe
from training.tiny_sd3.text import train_tokenizer
from training.tiny_wan import autoencoder
from training.tiny_wan import denoiser as wan
from training.tiny_wan.data import FRAMES, all_captions, render
from training.tiny_wan.recipe import Recipe as WanRecipe
from training.tiny_wan.text import build_tokenizer


@pytest.mark.parametrize("side", [16, 32, 64])
def test_digits_fill_a_picture_of_any_size_alike(side):
    masks, labels = digit_masks(side)
    assert masks.shape == (1797, 1, side, side) and len(labels) == 1797
    assert float(masks.mean()) == pytest.approx(float(digit_masks()[0].mean()), abs=0.02)
    margin = side // 16
    assert not masks[..., :margin, :].any() and not masks[..., -margin:].any()


@pytest.mark.parametrize("side", [16, 32, 64])
def test_shapes_grow_with_the_frame_and_stay_inside_it(side):
    torch.manual_seed(0)
    caption = all_captions()[0]
    clips = render(caption, 8, side)
    assert clips.shape == (8, 3, FRAMES, side, side)
    background = clips[..., :1, :1]
    covered = (clips != background).any(1)
    assert covered.flatten(2).any(-1).all(), "the shape is seen in every frame"
    edges = [
        covered[..., 0, :],
        covered[..., -1, :],
        covered[..., :, 0],
        covered[..., :, -1],
    ]
    assert not any(edge.any() for edge in edges)
    share = covered.float().mean()
    torch.manual_seed(0)
    published = render(caption, 8)
    assert float(share) == pytest.approx(
        float((published != published[..., :1, :1]).any(1).float().mean()), rel=0.4
    )


def test_a_batch_of_digits_is_made_on_the_device_of_the_recipe():
    """The meta device computes nothing and refuses tensors of another one, as a GPU does."""
    from diffusers import AutoencoderKL

    from training.tiny_sd3.__main__ import VAE_FOLDER

    recipe = replace(Sd3Recipe(), device="meta", side=64, pictures=8)
    vae = AutoencoderKL.from_pretrained(VAE_FOLDER).to("meta")
    tokenizer = train_tokenizer(recipe.text_encoder.slots)
    with torch.device("meta"):
        data = sd3.prepare_data(vae, tokenizer, recipe)
        encoders = [sd3.build_text_encoder(tokenizer, recipe.text_encoder) for _ in range(2)]
        transformer = sd3.build_transformer(recipe.transformer, 128, vae, recipe.side)
        model = sd3.Denoiser(transformer, *encoders).to("meta")
        loss = sd3.random_batch_loss(model, data, recipe)
        loss.backward()
    assert data.latents.shape == (13, 8, 16, 16, 16)
    assert {loss.device.type, data.input_ids.device.type} == {"meta"}


def test_a_batch_of_clips_is_made_on_the_device_of_the_recipe(monkeypatch):
    monkeypatch.setattr(wan, "all_captions", lambda: all_captions()[:2])
    recipe = replace(WanRecipe(), device="meta", side=64, clips_per_caption=3)
    tokenizer = build_tokenizer(recipe.text_encoder.slots)
    with torch.device("meta"):
        vae = autoencoder.build_autoencoder(recipe.autoencoder).eval()
        data = wan.prepare_data(vae, tokenizer, recipe)
        transformer = wan.build_transformer(recipe.transformer, 64, vae.config.z_dim)
        model = wan.Denoiser(transformer, torch.nn.Identity()).to("meta")
        # transformers reads the mask's values, of which this device has none.
        monkeypatch.setattr(
            model, "encode", lambda tokens: torch.zeros(*tokens.shape[:2], 64)
        )
        loss = wan.random_batch_loss(model, data, recipe)
        loss.backward()
    assert data.latents.shape == (2, 3, 16, 5, 16, 16)
    assert {loss.device.type, data.tokens.device.type} == {"meta"}


def test_training_in_bfloat16_keeps_weights_in_float32_and_goes_on_where_it_was(tmp_path):
    from training.loop import LoopRecipe, Training

    recipe = LoopRecipe(steps=4, batch=2, learning_rate=1e-2, bfloat16=True)
    seen = []

    def batch_loss(model: torch.nn.Module) -> torch.Tensor:
        output = model(torch.randn(2, 3))
        seen.append(output.dtype)
        return output.float().square().mean()

    def trained(steps: int, checkpoint=None) -> Training:
        torch.manual_seed(0)
        training = Training(torch.nn.Linear(3, 3), recipe)
        if checkpoint is not None:
            training.load(checkpoint)
        while training.step < steps:
            training.train_step(batch_loss)
        return training

    whole = trained(4)
    trained(2).save(tmp_path / "half.pt")
    resumed = trained(4, tmp_path / "half.pt")
    assert set(seen) == {torch.bfloat16} and whole.model.weight.dtype == torch.float32
    assert torch.equal(whole.average.weight, resumed.average.weight)
