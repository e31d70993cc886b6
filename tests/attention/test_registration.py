"""Whole models: a pack equals its separate sequences, family by family, and the traps are refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.models import gemma2, gemma3, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe

from longpo_ops.attention import PrefixNotShared, explain_attention, use_shared_prefix
from longpo_ops.data import PairSpans, SharedPrefixLayout
from tests.budget import check_budget

from .dense import TrueFloat64, make_layout, positions, sequences

SIZES = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    initializer_range=0.15,  # attention far from uniform: a wrong mask shows
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    tie_word_embeddings=False,
)
LOCAL = dict(sliding_window=7, layer_types=["sliding_attention", "full_attention"])
FAMILIES = {
    "llama": lambda: llama.LlamaConfig(**SIZES),
    "mistral": lambda: mistral.MistralConfig(**SIZES, sliding_window=None),
    "mistral, window": lambda: mistral.MistralConfig(**SIZES, sliding_window=7),
    "mixtral": lambda: mixtral.MixtralConfig(**SIZES, num_local_experts=4, sliding_window=7),
    "qwen2": lambda: qwen2.Qwen2Config(**SIZES),
    "qwen2, window": lambda: qwen2.Qwen2Config(**SIZES, use_sliding_window=True, **LOCAL),
    "qwen3": lambda: qwen3.Qwen3Config(**SIZES),
    "qwen3_moe": lambda: qwen3_moe.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "gemma2": lambda: gemma2.Gemma2Config(**SIZES, query_pre_attn_scalar=16, attn_logit_softcapping=5.0, **LOCAL),
    "gemma3": lambda: gemma3.Gemma3TextConfig(**SIZES, query_pre_attn_scalar=16, **LOCAL),
}
MIXTURES = "mixtral", "qwen3_moe"  # an expert's products round by how many rows come to it, wherever they are from
FAMILY = pytest.mark.parametrize("family", FAMILIES)
DENSE = pytest.mark.parametrize("family", [family for family in FAMILIES if family not in MIXTURES])
# Two pairs, one of them with two rejected tails, of which the second leaves the first in its midst; a prefix of one token;
# tails longer and shorter than the window.
LAYOUT = SharedPrefixLayout(
    (PairSpans(0, 23, ((23, 34), (34, 43), (43, 45)), (22, 38)), PairSpans(45, 46, ((46, 49), (49, 53)))), 53
)


def make_model(family, attention="sdpa", dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    config._experts_implementation = "eager"  # grouped products of experts know no float64
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to(dtype).train()


def make_ids(layout=LAYOUT):
    """(1, T) random tokens; every rejected tail opens with the token it forks at."""
    ids = torch.randint(SIZES["vocab_size"], (1, layout.length), generator=torch.Generator().manual_seed(1))
    for pair in layout.pairs:
        for (start, _), fork in zip(pair.tails[1:], pair.forks, strict=True):
            ids[0, start] = ids[0, fork]
    return ids


def packed_hidden(model, ids, layout=LAYOUT):
    """Per pair, per tail: the last hidden states (n, H) of its sequence, cut out of one pack."""
    inputs = dict(position_ids=positions(layout), shared_prefix_layout=layout, use_cache=False)
    hidden = model.model(ids, **inputs).last_hidden_state[0]
    return [[hidden[rows] for rows in pair] for pair in sequences(layout)]


def separate_hidden(model, ids, layout=LAYOUT):
    """The same from one forward pass per sequence."""
    body = lambda rows: model.model(ids[:, rows], use_cache=False).last_hidden_state[0]  # noqa: E731
    return [[body(rows) for rows in pair] for pair in sequences(layout)]


def step(model, ids, hidden_of, layout=LAYOUT):
    """Hidden states, log-probs of every next token, loss and all parameter gradients of a two-turn preference step."""
    hidden = hidden_of(model, ids, layout)
    logps, loss = [], 0.0
    for pair, spans, states in zip(sequences(layout), layout.pairs, hidden, strict=True):
        sums = []
        for rows, h in zip(pair, states, strict=True):
            token = ids[0, rows][1:]
            logp = F.log_softmax(model.lm_head(h[:-1]), -1).gather(1, token[:, None])[:, 0]
            answer = logp[spans.prefix_end - spans.start - 1 :]
            # The tail's middle stands for the next turn's question: in the sequence, in no answer.
            keep = torch.arange(len(answer)) % 4 != 2
            sums.append((answer * keep).sum())
            logps.append(logp)
        loss = loss - F.logsigmoid(0.3 * (sums[0] - torch.stack(sums[1:]).mean())) - 0.5 * logps[-len(pair)].mean()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.any() for g in grads.values())
    model.zero_grad()
    flat = {f"hidden {i}.{j}": h for i, pair in enumerate(hidden) for j, h in enumerate(pair)}
    flat |= {f"logps {i}": x for i, x in enumerate(logps)}
    return {name: x.detach() for name, x in (flat | {"loss": loss} | grads).items()}


def packed_step(model, ids, layout=LAYOUT):
    with use_shared_prefix(model):
        return step(model, ids, packed_hidden, layout)


def compare(family, dtype, seeds=range(4)):
    """Every result, over draws of the model's weights."""
    runs = [[], [], []]
    for seed in seeds:
        ids, model = make_ids(), make_model(family, dtype=dtype, seed=seed)
        eager = make_model(family, "eager", dtype, seed)
        runs[0].append(packed_step(model, ids))
        # PyTorch's attention has no soft-cap: transformers itself asks for eager there.
        runs[1].append(step(eager if family == "gemma2" else model, ids, separate_hidden))
        with TrueFloat64():
            runs[2].append(step(eager.double(), ids, separate_hidden))
    for name in runs[0][0]:
        check_budget(f"{family}: {name}", *([run[name] for run in part] for part in runs))


@DENSE
def test_equals_separate_sequences(family):
    compare(family, torch.float32)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_equals_separate_sequences_in_bf16(family):
    compare(family, torch.bfloat16)


@FAMILY
def test_is_exact_in_float64(family):
    """Order of summation is all that may differ: what the error budget might hide in float32 cannot hide here."""
    ids, model = make_ids(), make_model(family, "eager", torch.float64)
    with TrueFloat64():
        ours, truth = packed_step(model, ids), step(model, ids, separate_hidden)
    for name in truth:
        torch.testing.assert_close(ours[name], truth[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@FAMILY
def test_gradient_checkpointing_changes_nothing(family):
    ids, model = make_ids(), make_model(family)
    before = packed_step(model, ids)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        after = packed_step(model, ids)
        for name in before:
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)


@DENSE
def test_who_sees_whom(family):
    """Exactly the rows that may see a token change with it: all others stay the same to the last bit."""
    layout = make_layout((5, 3, 4, 2), (4, 2, 3))  # every sequence within the window
    model, ids = make_model(family).eval(), make_ids(layout)

    def hidden(tokens):
        with torch.no_grad(), use_shared_prefix(model):
            inputs = dict(position_ids=positions(layout), shared_prefix_layout=layout, use_cache=False)
            return model.model(tokens, **inputs).last_hidden_state[0]

    before = hidden(ids)
    for token in range(layout.length):
        changed = ids.clone()
        changed[0, token] = (ids[0, token] + 1) % SIZES["vocab_size"]
        moved = set((hidden(changed) != before).any(-1).nonzero()[:, 0].tolist())
        seeing = [rows[rows.index(token) :] for pair in sequences(layout) for rows in pair if token in rows]
        assert moved == {row for rows in seeing for row in rows}, f"token {token}"


@pytest.mark.parametrize("family", ["llama", "mistral, window", "gemma3"])
def test_packed_sequence_trap_is_avoided(family):
    """Stock attention given the same row: the rejected tail loses the prefix, or with a mask of ones sees too much."""
    model, ids = make_model(family).eval(), make_ids()
    ones = torch.ones_like(ids)
    with torch.no_grad():
        truth = separate_hidden(model, ids)
        rejected = truth[0][1][-8:]
        for mask in (None, ones):
            stock = model.model(ids, attention_mask=mask, position_ids=positions(LAYOUT), use_cache=False)
            trapped = stock.last_hidden_state[0, slice(*LAYOUT.pairs[0].tails[1])][-8:]
            assert (trapped - rejected).abs().max() > 0.1 * rejected.abs().max()
        with use_shared_prefix(model):
            for mask in (None, ones):
                inputs = dict(position_ids=positions(LAYOUT), shared_prefix_layout=LAYOUT, use_cache=False)
                ours = model.model(ids, attention_mask=mask, **inputs).last_hidden_state[0]
                torch.testing.assert_close(ours[sequences(LAYOUT)[0][1]][-8:], rejected, rtol=1e-4, atol=1e-4)


@FAMILY
def test_without_layout_it_is_the_models_own_attention(family):
    model, ids = make_model(family, "eager", torch.float64).eval(), make_ids()
    with torch.no_grad(), TrueFloat64():
        expected, written = model(ids).logits, model.generate(ids[:, :12], max_new_tokens=9, do_sample=False)
        with use_shared_prefix(model):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-9, atol=1e-11)
            assert torch.equal(model.generate(ids[:, :12], max_new_tokens=9, do_sample=False), written)


def test_handle_restores_the_former_attention():
    model, ids = make_model("llama").eval(), make_ids()
    before = model(ids).logits
    handle = use_shared_prefix(model)
    assert model.config._attn_implementation == "longpo_shared_prefix"
    handle.remove()
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, before)
    # The cache check is gone as well: the stock attention would silently ignore the layout, as it always did.
    model(ids, shared_prefix_layout=LAYOUT, use_cache=True)


@pytest.fixture
def shared():
    model = make_model("llama").eval()
    with use_shared_prefix(model):
        yield model


def test_refuses_a_cache(shared):
    with pytest.raises(ValueError, match="use_cache=False"):
        shared(make_ids(), position_ids=positions(LAYOUT), shared_prefix_layout=LAYOUT, use_cache=True)


def test_refuses_positions_that_do_not_fit(shared):
    ids = make_ids()
    with pytest.raises(ValueError, match="position_ids do not fit"):
        shared(ids, shared_prefix_layout=LAYOUT, use_cache=False)
    with pytest.raises(ValueError, match="no shared_prefix_layout came"):
        shared(ids, position_ids=positions(LAYOUT), use_cache=False)


@pytest.mark.parametrize("row", [5, 30, 40, 60], ids=["prefix", "chosen", "first rejected", "second pair"])
def test_refuses_positions_that_go_back_within_a_sequence(shared, row):
    layout = make_layout((23, 11, 9, 2), (15, 3, 4))
    given = positions(layout)
    ids = make_ids(layout)
    shared(ids, position_ids=given, shared_prefix_layout=layout, use_cache=False)
    given[0, row] = given[0, row - 1] - 1
    with pytest.raises(ValueError, match=r"position_ids do not fit .* go back"):
        shared(ids, position_ids=given, shared_prefix_layout=layout, use_cache=False)


def test_takes_positions_that_jump_ahead(shared):
    """Position synthesis skips positions: stock transformers would take each jump for a new sequence."""
    ids, jump = make_ids()[:, :20], torch.arange(20)[None] + 50 * (torch.arange(20) >= 10)
    full = shared(ids, position_ids=jump, use_cache=False).logits
    assert not torch.equal(full[0, 10:], shared(ids[:, 10:], position_ids=jump[:, 10:], use_cache=False).logits[0])


def test_refuses_padding_and_foreign_masks(shared):
    ids = make_ids()
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    with pytest.raises(ValueError, match="has 3 zeros"):
        shared(ids, attention_mask=padded)
    with pytest.raises(ValueError, match="no mask of its own"):
        shared(ids, attention_mask=torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool))


def test_refuses_a_layout_of_another_length(shared):
    with pytest.raises(ValueError, match="describes 53 rows"):
        ids = torch.cat([make_ids(), make_ids()[:, -1:]], 1)
        shared(ids, position_ids=positions(make_layout((53, 1))), shared_prefix_layout=LAYOUT, use_cache=False)


def test_refuses_a_static_cache(shared):
    with pytest.raises(ValueError, match="static"):
        shared.generate(make_ids()[:, :5], max_new_tokens=3, cache_implementation="static", do_sample=False)


def test_refuses_dropout():
    model = make_model("llama")
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(PrefixNotShared, match=r"drops out 0\.1 of its attention in training"):
        use_shared_prefix(model)
    model.config.attention_dropout = 0.0
    with use_shared_prefix(model), pytest.raises(ValueError, match="attention_dropout"):
        model(make_ids())


def test_refuses_a_bidirectional_model():
    config = FAMILIES["gemma3"]()
    config.use_bidirectional_attention = True
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(PrefixNotShared, match="neither causal"):
        use_shared_prefix(model)


def test_reaches_the_layers_of_a_peft_model():
    peft = pytest.importorskip("peft")
    ids, base = make_ids(), make_model("llama", dtype=torch.float64)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).double()
    inputs = dict(position_ids=positions(LAYOUT), shared_prefix_layout=LAYOUT, use_cache=False)
    rows = sequences(LAYOUT)[0][1]
    with TrueFloat64():
        expected = model(ids[:, rows], use_cache=False).logits[0, -8:]
        with use_shared_prefix(model):
            torch.testing.assert_close(model(ids, **inputs).logits[0, rows[-8:]], expected, rtol=1e-9, atol=1e-11)
            with pytest.raises(ValueError, match="use_cache=False"):
                model(ids, **(inputs | dict(use_cache=True)))


def test_import_is_light():
    code = "import sys, longpo_ops.attention; sys.exit('transformers' in sys.modules or 'triton' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_explains_which_kernel_runs_and_why():
    report = explain_attention(make_model("llama"), LAYOUT)
    assert "2 layers" in report and "own rows x5: torch flash attention for CPU" in report
    assert "shared prefix x2: torch flash attention for CPU" in report  # a prefix of one token leaves nothing to share
    report = explain_attention(make_model("gemma2"), LAYOUT)
    assert "window 7" in report and "blockwise PyTorch (torch flash attention for CPU has no soft-cap (5))" in report
