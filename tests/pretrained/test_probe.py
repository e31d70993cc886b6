"""What all proofs are made of: layers of every kind, all numbers random, and a difference that nothing passes unseen."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from longpo_ops.pretrained.probe import Refused, build, difference, kinds_of, pick_layers, randomise, with_gradients
from longpo_ops.pretrained.small import small_config


def pick(kind, each, **fields):
    config = AutoConfig.for_model(kind, **fields)
    return pick_layers(AutoModelForCausalLM._model_mapping[type(config)], config, "eager", each)


def test_layers_of_each_kind_are_picked_and_every_layer_has_its_like():
    windows = [0, 0, 0, 0, 0]
    assert pick("gemma3_text", 1, num_hidden_layers=12) == ([0, 5], [*windows, 1] * 2)
    assert pick("gemma3_text", 2, num_hidden_layers=12) == ([0, 1, 5, 11], [*windows, 2] * 2)
    assert pick("llama", 2, num_hidden_layers=1) == ([0], [0])


def test_a_config_that_says_its_layers_by_numbers_is_cut_after_the_first_that_have_all_kinds():
    picked, like = pick("jamba", 1, num_hidden_layers=8)
    assert picked == [0, 1, 2, 3, 4] and like == [0, 1, 0, 1, 4, 1, 0, 1]


def test_layers_that_differ_in_a_shape_a_setting_or_in_what_the_config_lists_are_of_other_kinds():
    config = small_config(AutoConfig.for_model("llama", num_hidden_layers=2))
    model = AutoModelForCausalLM.from_config(config)
    same = kinds_of(model)
    assert same[0] == same[1]
    for change in (
        lambda: setattr(model.model.layers[1].mlp, "down_proj", nn.Linear(7, 64)),
        lambda: setattr(model.model.layers[0].self_attn, "window", 5),
        lambda: setattr(config, "no_rope_layers", [1, 0]),
    ):
        before = kinds_of(model)
        change()
        assert len(set(kinds_of(model))) == 2 and kinds_of(model) != before


def test_no_number_that_is_trained_or_stored_stays_as_it_was_made():
    config = small_config(AutoConfig.for_model("deepseek_v3", first_k_dense_replace=0), layers=[0])
    model = build(AutoModelForCausalLM._model_mapping[type(config)], config)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert any("e_score_correction_bias" in name for name in before)
    randomise(model)
    assert all((x != before[name]).all() for name, x in model.state_dict().items())


def test_a_model_whose_code_fails_is_refused_by_name():
    class Broken(nn.Module):
        def __init__(self, config):
            raise KeyError("rope")

    with pytest.raises(Refused, match=r"a small Broken of its config cannot be built \(KeyError: 'rope'\)"):
        build(Broken, None)


X = torch.tensor([1.0, 2.0])
FAR = {
    "a number": ({"x": X, "y": X + 1}, ("y", 1 / 2)),
    "none for one": ({"x": X, "y": None}, ("y", 1.0)),
    "none at all": ({"x": X}, ("y", float("inf"))),
    "one too many": ({"x": X, "y": X, "z": X}, ("z", float("inf"))),
    "another shape": ({"x": X, "y": X[:1]}, ("y", float("inf"))),
    "no number": ({"x": X, "y": X * float("nan")}, ("y", float("inf"))),
}


@pytest.mark.parametrize("what", FAR)
def test_a_difference_is_named_and_measured(what):
    ours, expected = FAR[what]
    assert difference(ours, {"x": X, "y": X}) == expected


def test_none_is_zero_and_what_is_small_is_measured_by_the_largest():
    assert difference({"x": X, "y": None}, {"x": X, "y": torch.zeros(2)})[1] == 0
    assert difference({"x": X, "y": torch.full((2,), 1e-6)}, {"x": X, "y": torch.zeros(2)})[1] == pytest.approx(5e-4)


def test_gradients_are_of_all_that_is_wanted():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    found = with_gradients({"twice": 2 * a}, {"a": a, "b": b})
    assert found.keys() == {"twice", "gradients of a", "gradients of b"} and found["gradients of b"] is None
    assert not found["twice"].requires_grad and found["gradients of a"].abs().min() > 0
