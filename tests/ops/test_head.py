"""PreferenceHead, attach and detach: whole transformers models, copies, changes after attaching, mixtures of experts.

Adapters are in test_head_weight.py, what attach measures in test_head_probe.py.
"""

import copy
import io
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models import cohere, gemma2, granite, llama, mixtral, qwen2, qwen3_moe

from longpo_ops import (
    DPO,
    PreferenceHead,
    SimPO,
    attach,
    detach,
    fused_preference_loss,
    linear_cross_entropy,
    linear_kl,
    linear_logprobs,
)

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None,
    eos_token_id=None, pad_token_id=None,
)  # fmt: skip
FAMILIES = {
    "llama": lambda: llama.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama tied": lambda: llama.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: qwen2.Qwen2Config(**SIZES, tie_word_embeddings=False),
    "gemma2 soft-cap": lambda: gemma2.Gemma2Config(**SIZES, final_logit_softcapping=2.0),
    "cohere scale": lambda: cohere.CohereConfig(**SIZES, logit_scale=0.25),
    "granite scale": lambda: granite.GraniteConfig(**SIZES, logits_scaling=4.0),
}


def make(family="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()


def batch():
    ids = torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(1))
    answers = ids.clone()
    answers[:, :8] = -100
    return ids, answers


def preference(answers, **options):
    return lambda hidden, head: head((hidden[:2], hidden[2:]), (answers[:2], answers[2:]), objective=SimPO(), **options)


def from_logits(model, ids, answers):
    """SimPO from the model's own logits."""
    logp = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    labels = answers[:, 1:]
    mean = (logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)).sum(1) / (labels >= 0).sum(1)
    return -torch.nn.functional.logsigmoid(2 * (mean[:2] - mean[2:]) - 1).mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(ours, truth, scale=1.0):
    assert ours.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(
            ours[name] * scale, truth[name], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attached_model_equals_its_own_logits(family):
    model, (ids, answers) = make(family), batch()
    truth = from_logits(model, ids, answers)
    true_gradients = gradients(model, truth)
    assert attach(model) is model
    hidden = model(ids, use_cache=False).last_hidden_state
    assert hidden.shape == (4, 12, 32)
    out = model(ids, use_cache=False, compute=preference(answers))
    torch.testing.assert_close(out.loss, truth, rtol=1e-4, atol=1e-5)
    compare(gradients(model, out.loss), true_gradients)
    detach(model)
    torch.testing.assert_close(from_logits(model, ids, answers), truth)


def test_detach_leaves_nothing_behind():
    model = make()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    detach(attach(model))
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


def test_compute_may_call_any_function_of_the_package():
    model, (ids, answers) = attach(make()), batch()

    def compute(hidden, head):
        rows, labels = hidden[:, :-1].flatten(0, 1), answers[:, 1:].flatten()
        logps = head(rows, labels, loss=linear_logprobs)
        return logps.sum() / (labels >= 0).sum(), head(rows, labels, loss=linear_cross_entropy)

    a, b = model(ids, use_cache=False, compute=compute)
    torch.testing.assert_close(-a, b)
    assert torch.autograd.grad(b, model.lm_head.weight)[0].any()


def test_preference_head_is_the_function_with_its_parameters():
    weight, bias = torch.nn.Parameter(torch.randn(11, 8)), torch.nn.Parameter(torch.randn(11))
    head = PreferenceHead(weight, bias, softcap=3.0, scale=0.5)
    assert dict(head.named_parameters()).keys() == {"weight", "bias"} and "8 -> 11" in repr(head)
    chosen, rejected, labels = torch.randn(2, 5, 8), torch.randn(2, 4, 8), torch.randint(11, (2, 5))
    out = head((chosen, rejected), (labels, labels[:, :4]), objective="simpo")
    truth = fused_preference_loss(
        chosen, rejected, weight, labels, labels[:, :4], objective="simpo", bias=bias, softcap=3.0, scale=0.5
    )
    assert torch.equal(out.loss, truth.loss)
    logps = head(chosen[0], labels[0], loss=linear_logprobs, softcap=None)
    assert torch.equal(logps, linear_logprobs(chosen[0], weight, labels[0], bias=bias, scale=0.5))
    logps.sum().backward()
    assert weight.grad.any() and bias.grad.any()


def test_tied_heads_take_both_gradients():
    model, (ids, answers) = make("llama tied"), batch()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    attach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    grads = gradients(model, model(ids, use_cache=False, compute=preference(answers)).loss)
    unused = next(t for t in range(61) if t not in ids)  # in no input: its gradient comes from the head alone
    assert grads["model.embed_tokens.weight"][unused].any()


def test_a_copy_of_an_attached_model_reads_its_own_head():
    model, (ids, answers) = attach(make()), batch()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(3)
    run = lambda m: m(ids, use_cache=False, compute=preference(answers)).loss  # noqa: E731
    assert abs(run(twin) - run(model)) > 1e-3
    run(twin).backward()
    assert twin.lm_head.weight.grad is not None and model.lm_head.weight.grad is None
    torch.testing.assert_close(from_logits(detach(twin), ids, answers), run(attach(twin)), rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_and_compile_of_the_body():
    model, (ids, answers) = attach(make()).train(), batch()
    plain = gradients(model, model(ids, use_cache=False, compute=preference(answers)).loss)
    model.gradient_checkpointing_enable()
    compare(gradients(model, model(ids, use_cache=False, compute=preference(answers)).loss), plain)


def test_reuse_hidden_behind_a_real_norm():
    model, (ids, answers) = attach(make()), batch()
    plain = gradients(model, model(ids, use_cache=False, compute=preference(answers)).loss)
    compare(gradients(model, model(ids, use_cache=False, compute=preference(answers, reuse_hidden=True)).loss), plain)


# -- changes after attaching -----------------------------------------------------------------------------------------


def test_a_head_that_grew_is_the_one_that_is_used():
    model, (ids, answers) = attach(make()), batch()
    torch.manual_seed(5)
    model.resize_token_embeddings(61 + 13, mean_resizing=False)
    ours = model(ids, use_cache=False, compute=preference(answers)).loss
    grads = gradients(model, ours)
    assert grads["lm_head.weight"].shape == (74, 32) and grads["lm_head.weight"][61:].any()
    truth = from_logits(detach(model), ids, answers)
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)
    compare(grads, gradients(model, truth))


def test_a_head_that_was_replaced_or_tied_is_the_one_that_is_used():
    model, (ids, answers) = attach(make()), batch()
    model.set_output_embeddings(torch.nn.Linear(32, 61, bias=True))
    ours = model(ids, use_cache=False, compute=preference(answers)).loss
    assert gradients(model, ours)["lm_head.bias"].any()
    torch.testing.assert_close(ours, from_logits(detach(model), ids, answers), rtol=1e-4, atol=1e-5)
    attach(model).lm_head.weight = model.model.embed_tokens.weight
    ours = model(ids, use_cache=False, compute=preference(answers)).loss
    torch.testing.assert_close(ours, from_logits(detach(model), ids, answers), rtol=1e-4, atol=1e-5)


def test_an_attached_model_goes_through_a_file():
    model, (ids, answers) = attach(make("gemma2 soft-cap")), batch()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    run = lambda m: m(ids, use_cache=False, compute=preference(answers)).loss  # noqa: E731
    assert torch.equal(run(twin), run(model)) and twin.lm_head.weight is not model.lm_head.weight
    assert torch.equal(from_logits(detach(twin), ids, answers), from_logits(detach(model), ids, answers))


def test_generation_is_that_of_the_model_itself():
    model, (ids, answers) = make(), batch()
    truth = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    attach(model)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=4, do_sample=False), truth)
    assert model(ids, use_cache=False, compute=preference(answers)).loss > 0


def test_a_failed_call_leaves_the_head_as_it_was():
    model, (ids, answers) = attach(make()), batch()
    with pytest.raises(ZeroDivisionError):
        model(ids, use_cache=False, compute=lambda hidden, head: 1 / 0)
    assert "forward" not in model.lm_head.__dict__ and "lm_head" not in model.__dict__
    assert model(ids, use_cache=False, compute=preference(answers)).loss > 0


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
def test_compiled_code_sees_a_changed_map(broken):
    """Each change, and not the first alone, after which Dynamo takes a number for one that varies. Dynamo of torch 2.11
    cannot take an attribute of a module away, so the graph is never whole there."""
    (ids, answers), config = batch(), FAMILIES["gemma2 soft-cap"]()
    config.num_hidden_layers, config.layer_types = 0, []  # which are half of what would be traced
    model, loss = attach(AutoModelForCausalLM.from_config(config)), preference(answers, backend="torch")

    def compute(hidden, head):
        if broken:
            torch._dynamo.graph_break()
        return loss(hidden, head)

    whole = not broken and torch.__version__ >= (2, 13)
    compiled = torch.compile(model, fullgraph=whole, backend="eager")
    seen, caps = [], (3.0, 0.5, 0.7)
    for cap in caps:
        model.config.final_logit_softcapping = cap
        seen.append(compiled(ids, use_cache=False, compute=compute).loss)
    detach(model)
    for cap, ours in zip(caps, seen, strict=True):
        model.config.final_logit_softcapping = cap
        torch.testing.assert_close(ours, from_logits(model, ids, answers), rtol=1e-4, atol=1e-5)
    assert len({round(ours.item(), 3) for ours in seen}) == 3


def test_a_compiled_model_is_attached_inside():
    """Its compiled call runs the forward that is attached; one on the wrapper would go past the compiler."""
    model = make()
    compiled = torch.compile(model)
    assert attach(compiled) is compiled
    assert "forward" in model.__dict__ and "generate" not in compiled.__dict__
    assert model(batch()[0], use_cache=False, compute=preference(batch()[1])).loss > 0
    detach(compiled)
    assert "forward" not in model.__dict__


def test_labels_are_refused_by_name_and_by_position():
    model, (ids, answers) = attach(make()), batch()
    for args, named in (((ids,), dict(labels=answers)), ((ids, None, None, None, None, answers), {})):
        assert detach(model)(*args, **named).loss > 0
        for compute in (None, preference(answers)):
            with pytest.raises(
                ValueError, match=r"labels: LlamaForCausalLM is attached and makes no logits.*detach\(m"
            ):
                attach(model)(*args, **named, compute=compute)
            detach(model)
        attach(model)


# -- hooks on the head -------------------------------------------------------------------------------------------------

HOOKS = {  # what it does to an output, and what is told of it
    "reads logits": (lambda *given: given[-1].mean() and None, "failed .AttributeError: 'tuple' object"),
    "doubles them": (lambda *given: given[-1] * 2, "returned tuple in its place"),
    "unpacks": (lambda *given: given[-1][0] if isinstance(given[-1], tuple) else None, "returned tuple in its place"),
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_on_the_head_that_wants_logits_is_named(name):
    """At attach(), and where it comes later."""
    hook, told = HOOKS[name]
    model, (ids, answers) = make(), batch()
    told = rf"forward hook on the head of LlamaForCausalLM: tests\.ops\.test_head\.<lambda> got a tuple .* {told}"
    handle = model.lm_head.register_forward_hook(hook)
    with pytest.raises(ValueError, match=told):
        attach(model)
    handle.remove()
    attach(model).lm_head.register_forward_hook(hook)
    with pytest.raises(ValueError, match=told):
        model(ids, use_cache=False, compute=preference(answers))
    model.lm_head._forward_hooks.clear()
    assert model(ids, use_cache=False, compute=preference(answers)).loss > 0


@pytest.mark.parametrize("later", [False, True])
def test_what_a_hook_makes_of_logits_is_part_of_the_map(later):
    """One that lets tuples pass would lose its effect in silence."""
    hook = lambda module, args, output: output * 2 if isinstance(output, torch.Tensor) else None  # noqa: E731
    model, (ids, answers) = make(), batch()
    plain = from_logits(model, ids, answers)
    if later:
        attach(model)
    model.lm_head.register_forward_hook(hook)
    if not later:
        attach(model)
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] / 4,))
    out = model(ids, use_cache=False, compute=preference(answers))
    truth = from_logits(detach(model), ids, answers)
    torch.testing.assert_close(out.loss, truth, rtol=1e-4, atol=1e-5)
    assert abs(truth - plain) > 1e-3


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_on_the_head_is_named(register):
    model, (ids, answers) = attach(make()), batch()
    getattr(model.lm_head, register)(lambda module, *gradients: None)
    with pytest.raises(ValueError, match=r"backward hook on the head of LlamaForCausalLM: tests.* would not be called"):
        model(ids, use_cache=False, compute=preference(answers))


# -- mixtures of experts ---------------------------------------------------------------------------------------------


MIXTURES = {
    "mixtral": lambda: mixtral.MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True),
    "qwen3_moe": lambda: qwen3_moe.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, output_router_logits=True
    ),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_the_auxiliary_loss_of_a_mixture_of_experts_is_the_models_own(family, checkpointing):
    torch.manual_seed(0)
    model, (ids, answers) = AutoModelForCausalLM.from_config(MIXTURES[family]()).train(), batch()
    if checkpointing:
        model.gradient_checkpointing_enable()
    aux_loss = model(ids, use_cache=False).aux_loss
    truth = from_logits(model, ids, answers) + 0.5 * aux_loss
    true_gradients = gradients(model, truth)
    attach(model)
    with pytest.raises(ValueError, match=r"has an auxiliary loss .* that this call would lose.*return_outputs=True"):
        model(ids, use_cache=False, compute=preference(answers))
    out, outputs = model(ids, use_cache=False, compute=preference(answers), return_outputs=True)
    torch.testing.assert_close(outputs.aux_loss, aux_loss, rtol=1e-5, atol=1e-6)
    assert len(outputs.router_logits) == 2 and outputs.logits.shape == (4, 0, 61)
    compare(gradients(model, out.loss + 0.5 * outputs.aux_loss), true_gradients)
    with torch.no_grad():  # nothing is trained, so nothing is lost
        torch.testing.assert_close(model(ids, use_cache=False, compute=preference(answers)).loss, out.loss)


def test_an_auxiliary_loss_that_cannot_be_trained_is_refused():
    model, (ids, answers) = attach(AutoModelForCausalLM.from_config(MIXTURES["mixtral"]())).train(), batch()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match=r"auxiliary loss of MixtralForCausalLM has no gradient.*use_reentrant=False"):
        model(ids, use_cache=False, compute=preference(answers), return_outputs=True)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_wrong_models_are_refused():
    model = attach(make())
    with pytest.raises(ValueError, match="LlamaForCausalLM is attached already; detach"):
        attach(model)
    detach(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not attached"):
        detach(model)
    with pytest.raises(ValueError, match="Linear is no transformers causal LM; attach before wrapping"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LlamaModel has no language-model head"):
        attach(make().model)
    quantised = make()
    quantised.lm_head.weight = torch.nn.Parameter(torch.zeros(61, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="float weight"):
        attach(quantised)


def test_distillation_between_two_attached_models():
    student, teacher, (ids, _) = attach(make()), attach(make("llama tied")), batch()
    with torch.no_grad():
        quiet = teacher(ids, use_cache=False, compute=lambda hidden, head: hidden)

    def compute(hidden, head):
        def reverse_kl(hidden, weight, **options):
            fixed = quiet.flatten(0, 1), teacher.lm_head.weight.detach()
            return linear_kl(hidden, weight, *fixed, kind="reverse", **options)

        return head(hidden.flatten(0, 1), (), loss=reverse_kl)

    out = student(ids, use_cache=False, compute=compute)
    out.backward()
    assert out > 0 and student.lm_head.weight.grad.any() and teacher.lm_head.weight.grad is None


def test_dpo_of_a_model_with_itself_as_reference_is_log_two():
    model, (ids, answers) = attach(make()), batch()
    with torch.no_grad():
        free = model(ids, use_cache=False, compute=preference(answers))

    def compute(hidden, head):
        references = dict(ref_chosen_logps=free.chosen_logps, ref_rejected_logps=free.rejected_logps)
        return head((hidden[:2], hidden[2:]), (answers[:2], answers[2:]), objective=DPO(), **references)

    torch.testing.assert_close(model(ids, use_cache=False, compute=compute).loss, torch.tensor(2.0).log())


def test_what_is_no_loss_and_no_pair_of_hidden_states_is_refused_by_name():
    head = PreferenceHead(torch.nn.Parameter(torch.randn(11, 8)))
    rows, labels = torch.randn(2, 5, 8), torch.randint(11, (2, 5))
    model = attach(make())
    calls = [head, lambda *given, **options: model(batch()[0], compute=lambda hidden, head: head(*given, **options))]
    for call in calls:
        with pytest.raises(ValueError, match="loss='sum': expected a function"):
            call((rows, rows), (labels, labels), loss="sum")
        with pytest.raises(ValueError, match="fused_preference_loss takes 2 and 2 tensors, got 1 and 2"):
            call(rows, (labels, labels))
        with pytest.raises(ValueError, match="fused_preference_loss takes 2 and 2 tensors, got 2 and 3"):
            call((rows, rows), (labels, labels, labels))
    for wrong in ({"merge_lora": 1}, {"check": "no"}, {"softcap": "x", "check": False}, {"scale": 0, "check": False}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            attach(make(), **wrong)


def test_threads_that_share_a_model_get_their_own_numbers():
    model, ids = attach(make()), torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(2))

    def logps(row):
        def compute(hidden, head):
            return head(hidden[0, :-1], ids[row, 1:], loss=linear_logprobs)

        with torch.no_grad():
            return model(ids[row][None], use_cache=False, compute=compute)

    alone, before = [logps(row) for row in range(4)], sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(logps, [row for _ in range(12) for row in range(4)]))
    finally:
        sys.setswitchinterval(before)
    assert all(torch.equal(given, alone[call % 4]) for call, given in enumerate(together))


def test_the_model_may_be_called_while_its_loss_is_computed():
    """An adapter's base as the reference, say, or a text that is generated."""
    model, (ids, answers) = attach(make()), batch()
    heads = []

    def outer(hidden, head):
        heads.append(model.get_output_embeddings())
        with torch.no_grad():
            again = model(ids, use_cache=False, compute=preference(answers))
            heads.append(model.generate(ids[:1, :4], max_new_tokens=2, do_sample=False))
        return preference(answers)(hidden, head).loss - again.loss

    difference = model(ids, use_cache=False, compute=outer)
    assert difference.requires_grad and float(difference.detach()) == 0
    assert type(heads[0]) is torch.nn.Linear and heads[1].shape == (1, 6)
    assert model(ids, use_cache=False).last_hidden_state.shape == (4, 12, 32)


def test_a_head_of_another_kind_is_measured_again():
    class Normalised(torch.nn.Linear):
        def forward(self, hidden):
            return torch.nn.functional.linear(hidden, torch.nn.functional.normalize(self.weight))

    model = attach(make())
    model.lm_head = Normalised(32, 61, bias=False)
    with pytest.raises(ValueError, match="expected a linear head"):
        model(batch()[0], compute=lambda hidden, head: hidden)


def test_a_call_that_hides_the_auxiliary_loss_is_refused():
    with pytest.raises(ValueError, match="return_dict=False"):
        attach(make())(batch()[0], return_dict=False, compute=lambda hidden, head: hidden)
