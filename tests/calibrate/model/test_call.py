"""What a pipeline is called with: options win, unknown ones are refused, and the protocol says what was used."""

import pytest

from calibrate.errors import InvalidOption
from calibrate.model.call import parse_pipe_args, prepare_call
from calibrate.model.prompts import load_prompts
from calibrate.model.table import ModelSpec


def image_call(
    self,
    prompt=None,
    height=None,
    num_inference_steps=50,
    guidance_scale=4.5,
    generator=None,
    rewrite=True,
):
    pass


def edit_call(
    self,
    image,
    prompt,
    num_inference_steps=20,
    true_cfg_scale=4.0,
    guidance_scale=None,
    negative_prompt=None,
):
    pass


SPEC = ModelSpec(
    alias="Toy",
    pipeline_class="Toy",
    num_steps=28,
    height=64,
    num_frames=9,
    call_arguments={"rewrite": False},
)


def test_options_win_over_the_table_and_the_table_over_the_signature():
    call = prepare_call(image_call, SPEC, steps=10)
    assert call.arguments == {"num_inference_steps": 10, "height": 64, "rewrite": False}
    assert call.protocol["num_steps"] == 10 and call.protocol["guidance_scale"] == 4.5
    assert call.protocol["call_arguments"] == {"rewrite": False}


def test_default_that_the_pipeline_does_not_take_is_left_out_and_an_option_refused():
    assert "num_frames" not in prepare_call(image_call, SPEC).arguments
    with pytest.raises(
        InvalidOption, match="--num-frames: the pipeline takes no argument 'num_frames'"
    ):
        prepare_call(image_call, SPEC, num_frames=9)


def test_guidance_goes_to_the_argument_that_has_an_effect():
    """Qwen-Image ignores guidance_scale, which is there for distilled models only."""
    call = prepare_call(edit_call, None, guidance_scale=3.0)
    assert (
        call.arguments == {"true_cfg_scale": 3.0} and call.protocol["guidance_scale"] == 3.0
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pipe_args": {"rewrit": True}}, "did you mean rewrite"),
        ({"pipe_args": {"prompt": "x"}}, "use --prompts"),
        (
            {"pipe_args": {"height": 3}, "height": 4},
            "--height and --pipe-arg height set the same",
        ),
        ({"steps": 1}, "a pair needs two steps"),
        ({"pipe_args": {"num_inference_steps": 2.5}}, "a pair needs two steps"),
    ],
)
def test_what_cannot_be_called_is_refused(options, said):
    with pytest.raises(InvalidOption, match=said):
        prepare_call(image_call, SPEC, **options)


def test_prompts_have_to_fit_the_pipeline(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "negative_prompt": "b"}')
    with pytest.raises(InvalidOption, match="the pipeline takes no negative_prompt"):
        prepare_call(image_call, SPEC).refuse_unfit(load_prompts(path).prompts)
    with pytest.raises(
        InvalidOption, match="has no image, which the pipeline needs; give --image"
    ):
        prepare_call(edit_call, None).refuse_unfit(load_prompts(["a"]).prompts)


def test_pipe_args_are_plain_values():
    texts = [
        "a=false",
        "b=3",
        "c=2.5",
        "d=[1, 2]",
        'e={"x": null}',
        "f=some text",
        "g=",
        "h=None",
        "i= x=y ",
    ]
    assert parse_pipe_args(texts) == {
        "a": False, "b": 3, "c": 2.5, "d": [1, 2], "e": {"x": None}, "f": "some text", "g": "", "h": None, "i": "x=y"
    }  # fmt: skip


@pytest.mark.parametrize("texts", [["a"], ["=1"], ["a b=1"], ["a=1", "a=2"], ["a=NaN"]])
def test_malformed_pipe_args_are_refused(texts):
    with pytest.raises(InvalidOption, match="--pipe-arg"):
        parse_pipe_args(texts)
