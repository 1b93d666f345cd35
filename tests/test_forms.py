"""The forms: every field has an input, what is shown reads back as the same config, bad values become one sentence."""

import dataclasses
import math

import gradio as gr
import pytest

from app import forms
from lpo.config import CONFIGS, PRESETS, ConfigError, LPOConfig, LRMConfig, TraceConfig, from_preset, to_dict


def build(config, **options):
    with gr.Blocks():
        return forms.build(config, **options)


@pytest.mark.parametrize(
    ("command", "preset"), [(c, p) for c in ("trace", "train-lrm", "train-lpo") for p in PRESETS[c]]
)
def test_what_is_shown_reads_back_as_the_same_config(command, preset):
    config = from_preset(CONFIGS[command], preset)
    form = build(config)
    fixed = {"policy": to_dict(config.policy)} if command != "train-lrm" else {}
    assert form.read([component.value for component in form.inputs], **fixed) == config
    assert form.read(form.show(config), **fixed) == config


def test_every_field_but_the_policy_has_exactly_one_input_with_its_help():
    form = build(LPOConfig())
    assert sorted(form.names) == sorted(f.name for f in dataclasses.fields(LPOConfig) if f.name != "policy")
    helps = {f.name: f.metadata["help"] for f in dataclasses.fields(LPOConfig)}
    assert all(component.info == helps[name] for name, component in zip(form.names, form.inputs, strict=True))


def test_only_main_fields_are_outside_the_fold():
    form = build(LRMConfig(), leave_out=("pairs",))
    for name, component in zip(form.names, form.inputs, strict=True):
        folded, parent = False, component.parent
        while parent is not None:
            folded |= isinstance(parent, gr.Accordion)
            parent = parent.parent
        main = next(f for f in dataclasses.fields(LRMConfig) if f.name == name).metadata["main"]
        assert folded != main, name


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("lr", "fast", "learning rate is 'fast', but must be a number"),
        ("lr", "", "learning rate is empty"),
        ("lr", "-1", "learning rate is -1"),
        ("lr", "nan", "learning rate is not a number"),
        ("steps", None, "steps is empty"),
        ("steps", 2.5, "steps is 2.5, but must be a whole number"),
        ("steps", math.inf, "whole number"),
        ("steps", 0, "steps is 0"),
        ("train", "everything", "choose one of full, lora, heads"),
    ],
)
def test_bad_input_is_one_sentence(name, value, sentence):
    form = build(LRMConfig())
    values = form.show(LRMConfig())
    values[form.names.index(name)] = value
    with pytest.raises(ConfigError) as caught:
        form.read(values)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_number_that_may_be_left_out_is_no_number_box():
    """Gradio's number box makes 0 of nothing once it is on screen: height 0, in a form that nobody touched."""
    form = build(LPOConfig())
    for name in ("height", "width"):
        component = form.inputs[form.names.index(name)]
        assert isinstance(component, gr.Textbox) and component.value == ""


def test_numbers_as_people_type_them():
    assert forms.parse("lr", float, "6e-5") == 6e-5
    assert forms.parse("lr", float, "0,5") == 0.5
    assert forms.parse("beta", float, "1,000") == 1000 and forms.parse("beta", float, "-1,234,567.5") == -1234567.5
    assert forms.parse("beta", float, "0,125") == 0.125 and forms.parse("beta", float, "12,50") == 12.5
    assert forms.parse("height", int | None, "1,024") == 1024
    assert forms.parse("seed", int, 2**53 + 1) == forms.parse("seed", int, str(2**53 + 1)) == 2**53 + 1
    for text in ("1,00,000", "1.000,5", "9" * 5000):
        with pytest.raises(ConfigError, match=r"beta is .*must be"):
            forms.parse("beta", int, text)
    assert forms.parse("height", int | None, "") is None
    assert forms.parse("seeds", tuple[int, ...], "3\n 4 \n\n5") == [3, 4, 5]


def test_choices_of_the_lab_replace_the_class_own():
    form = build(TraceConfig(), choices={"threshold": [("always", "none"), ("by sigma", "sigma")]})
    component = form.inputs[form.names.index("threshold")]
    assert component.choices == [("always", "none"), ("by sigma", "sigma")]
