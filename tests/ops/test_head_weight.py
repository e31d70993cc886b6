"""A head's weight and bias as they are when a loss is computed: adapters merged, added, switched, disabled, quantised."""

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from longpo_ops import attach, detach

from .test_head import batch, compare, from_logits, gradients, make, preference


def lora(targets, **more):
    torch.manual_seed(3)
    model = get_peft_model(
        make(), LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **more)
    )
    return model.eval()


def test_lora_on_the_body():
    model, (ids, answers) = lora(["q_proj", "v_proj"]), batch()
    truth = from_logits(model, ids, answers)
    true_gradients = gradients(model, truth)
    attach(model)
    out = model(input_ids=ids, use_cache=False, compute=preference(answers))
    torch.testing.assert_close(out.loss, truth, rtol=1e-4, atol=1e-5)
    compare(gradients(model, out.loss), true_gradients)  # adapters only: the frozen head has none
    detach(model)


def test_lora_on_the_head_is_refused_or_merged():
    model, (ids, answers) = lora(["q_proj", "lm_head"]), batch()
    truth = from_logits(model, ids, answers)
    true_gradients = gradients(model, truth)
    with pytest.raises(ValueError, match="merge_lora=True"):
        attach(model)
    attach(model, merge_lora=True)
    out = model(input_ids=ids, use_cache=False, compute=preference(answers))
    torch.testing.assert_close(out.loss, truth, rtol=1e-4, atol=1e-5)
    grads = gradients(model, out.loss)
    assert any("lm_head.lora_B" in name for name in grads)
    compare(grads, true_gradients)
    with model.disable_adapter():
        off = model(input_ids=ids, use_cache=False, compute=preference(answers)).loss
    detach(model)
    with model.disable_adapter():
        torch.testing.assert_close(off, from_logits(model, ids, answers), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [dict(lora_dropout=0.1), dict(use_dora=True)], ids=str)
def test_adapters_that_cannot_be_merged_exactly_are_refused(more):
    with pytest.raises(ValueError, match="merge_lora=True: the head's adapter has dropout="):
        attach(lora(["lm_head"], **more), merge_lora=True)


def test_a_trained_copy_of_the_head():
    """modules_to_save: the copy is read, and the original while adapters are disabled (the reference of DPO)."""
    model, (ids, answers) = lora(["q_proj"], modules_to_save=["lm_head"]), batch()
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    truth = from_logits(model, ids, answers)
    true_gradients = gradients(model, truth)
    with model.disable_adapter():
        without = from_logits(model, ids, answers)
    attach(model)
    run = lambda: model(input_ids=ids, use_cache=False, compute=preference(answers)).loss  # noqa: E731
    torch.testing.assert_close(run(), truth, rtol=1e-4, atol=1e-5)
    compare(gradients(model, run()), true_gradients)
    with model.disable_adapter():
        torch.testing.assert_close(run(), without, rtol=1e-4, atol=1e-5)
    detach(model)


def same_as_logits(model):
    """The attached model's loss and gradients are those of its logits, for whatever its adapters are now."""
    ids, answers = batch()
    ours = model(input_ids=ids, use_cache=False, compute=preference(answers)).loss
    grads = gradients(model, ours)
    detach(model)
    truth = from_logits(model, ids, answers)
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)
    compare(grads, gradients(model, truth))
    attach(model, merge_lora=True)
    return grads


def second(targets, **more):
    torch.manual_seed(4)
    return LoraConfig(r=3, lora_alpha=9, target_modules=targets, init_lora_weights=False, **more)


def test_the_bias_of_an_adapter_is_merged_too():
    model = lora(["q_proj", "lm_head"], lora_bias=True)
    with torch.no_grad():
        model.get_base_model().lm_head.lora_B["default"].bias.normal_()
    assert any("lm_head.lora_B.default.bias" in name for name in same_as_logits(attach(model, merge_lora=True)))


def test_adapters_that_come_after_attaching():
    ids, answers = batch()
    model = get_peft_model(attach(make()), second(["q_proj", "lm_head"])).eval()
    with pytest.raises(ValueError, match=r"its head carries adapters \['default'\].*merge_lora=True"):
        model(input_ids=ids, use_cache=False, compute=preference(answers))
    detach(model)
    model = get_peft_model(attach(make(), merge_lora=True), second(["q_proj", "lm_head"])).eval()
    assert any("lm_head.lora_A" in name for name in same_as_logits(model))


def test_a_copy_of_the_head_that_comes_after_attaching():
    model = get_peft_model(attach(make()), second(["q_proj"], modules_to_save=["lm_head"])).eval()
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    assert any("lm_head.modules_to_save" in name for name in same_as_logits(model))


def test_adapters_that_are_switched():
    """To one that the head does not have, and to two at once."""
    model = attach(lora(["q_proj", "lm_head"]), merge_lora=True)
    model.add_adapter("body", second(["v_proj"]))
    model.add_adapter("both", second(["v_proj", "lm_head"]))
    model.set_adapter("body")
    assert not any("lm_head" in name for name in same_as_logits(model))
    model.set_adapter("both")
    assert any("lm_head.lora_A.both" in name for name in same_as_logits(model))
    model.base_model.set_adapter(["default", "body", "both"])
    assert {"default", "both"} == {n.split(".")[-2] for n in same_as_logits(model) if "lm_head.lora_A" in n}


def test_merged_adapters_and_none():
    model, (ids, answers) = attach(lora(["q_proj", "lm_head"]), merge_lora=True), batch()
    run = lambda: model(input_ids=ids, use_cache=False, compute=preference(answers)).loss  # noqa: E731
    unmerged = run()
    with model.disable_adapter():
        without = run()
    assert abs(unmerged - without) > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(run(), unmerged, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():  # PEFT takes them out again
        torch.testing.assert_close(run(), without, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(), unmerged, rtol=1e-4, atol=1e-5)


def test_a_copy_is_read_only_while_its_adapter_is_active():
    model = lora(["q_proj"], modules_to_save=["lm_head"])
    model.add_adapter("body", second(["v_proj"]))
    model.set_adapter("body")
    same_as_logits(attach(model))


def test_other_adapters_on_the_head_are_refused():
    config = IA3Config(target_modules=["q_proj", "lm_head"], feedforward_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"merge_lora=True: the head's adapter is Linear of peft.*ia3"):
        attach(get_peft_model(make(), config), merge_lora=True)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_quantised_head_is_refused(adapted):
    model = make()
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "lm_head")
    if adapted:
        model = get_peft_model(model, second(["lm_head"]))
    with pytest.raises(
        ValueError, match=r"its head's weight is .*; expected a float weight .*Leave lm_head out of quant"
    ):
        attach(model, merge_lora=adapted)


def test_a_quantised_body_is_none_of_the_heads_business():
    model, (ids, answers) = make(), batch()
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith("_proj"))
    truth = from_logits(model, ids, answers)
    ours = attach(model)(ids, use_cache=False, compute=preference(answers)).loss
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_adalora_on_the_head_is_refused():
    config = AdaLoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM", total_step=9, tinit=1, tfinal=1)
    with pytest.raises(ValueError, match="the head's adapter is SVDLinear"):
        attach(get_peft_model(make(), config), merge_lora=True)
