"""Tiled layers: the model's own results family by family, no long temporaries, no third forward."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.models import gemma

from longpo_ops.attention import use_shared_prefix
from longpo_ops.memory import offload_activations, tile_layers
from longpo_ops.memory.tiling import RowWise
from tests.attention.dense import TrueFloat64, positions
from tests.attention.test_registration import FAMILIES, LAYOUT, MIXTURES, SIZES, make_ids
from tests.budget import check_budget

FAMILIES = {name: FAMILIES[name] for name in FAMILIES if name not in MIXTURES} | {
    "gemma": lambda: gemma.GemmaConfig(**SIZES)
}
SHARED = [name for name in FAMILIES if name != "gemma"]  # which shared-prefix attention is not checked for
ROWS = 7  # several tiles, the last of them shorter


def make_model(family, dtype=torch.float32, attention="sdpa"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation=attention).train()
    for name, p in model.named_parameters():
        if "norm" in name or "bias" in name:  # as they are made, norms and biases would hide what is left out
            torch.nn.init.normal_(p, 0.5, 0.2)
    return model.to(dtype)


def upstream(dtype):
    return torch.randn(1, LAYOUT.length, SIZES["hidden_size"], generator=torch.Generator().manual_seed(5)).to(dtype)


def run(model, shared=True, **inputs):
    """Hidden states, and the gradients of all parameters of the body."""
    if shared:
        use_shared_prefix(model)
        inputs |= dict(position_ids=positions(LAYOUT), shared_prefix_layout=LAYOUT)
    model.zero_grad()
    hidden = model.model(make_ids(), use_cache=False, **inputs).last_hidden_state
    hidden.backward(upstream(hidden.dtype))
    return {"hidden": hidden.detach()} | {n: p.grad for n, p in model.model.named_parameters() if p.grad is not None}


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.fixture
def float64_tiles(monkeypatch):
    """PyTorch leaves function modes when it enters a backward: what tiles compute there must be float64 as well."""
    for name in ("forward", "backward"):
        method = getattr(RowWise, name)

        def widened(*args, method=method):
            with TrueFloat64():
                return method(*args)

        monkeypatch.setattr(RowWise, name, widened)


@pytest.mark.quick
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_models_own_layers_in_float64(family, checkpointing, float64_tiles):
    with TrueFloat64():
        expected = run(make_model(family, torch.float64), family in SHARED)
        model = make_model(family, torch.float64)
        if checkpointing:
            checkpointed(model)
        with tile_layers(model, ROWS):
            ours = run(model, family in SHARED)
    assert ours.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max()
        assert (ours[name] - expected[name]).abs().max() <= 1e-12 * scale, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_keeps_the_error_budget(family, dtype):
    """Against float64 no worse than the untiled model at the same dtype, in 16 bits as in 32."""
    weights = make_model(family, dtype).state_dict()
    truth_model = make_model(family, torch.float64)
    truth_model.load_state_dict(weights)
    with TrueFloat64():
        truth = run(truth_model)
    plain = run(make_model(family, dtype))
    with tile_layers(model := make_model(family, dtype), 16):
        ours = run(model)
    for name in truth:
        check_budget(name, ours[name], plain[name], truth[name])


class Rows(TorchDispatchMode):
    """Counts rows through matrices of a width, and the largest tensor that is made with it."""

    def __init__(self, width):
        super().__init__()
        self.width, self.largest = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor) and x.ndim > 1 and x.shape[-1] == self.width:
                self.largest = max(self.largest, x.numel() // self.width)
        return out


def test_no_mlp_temporary_is_as_long_as_the_sequence_and_no_third_forward():
    width = SIZES["intermediate_size"]
    for tiled in (False, True):
        model, rows = checkpointed(make_model("llama")), []
        for layer in model.model.layers:
            layer.mlp.up_proj.register_forward_hook(lambda module, args, out, to=rows: to.append(out.shape[1]))
        if tiled:
            tile_layers(model, ROWS)
        with Rows(width) as seen:
            run(model)
        assert sum(rows) == 2 * LAYOUT.length * len(model.model.layers)  # the forward, and once for the backward
        # Weights have 64 rows.
        assert (max(rows) <= ROWS and seen.largest == 64) if tiled else max(rows) == LAYOUT.length


def test_full_float32_gradients_where_asked_for():
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this PyTorch has no grad_dtype")
    model, plain = make_model("llama", torch.bfloat16), make_model("llama", torch.bfloat16)
    for p in model.parameters():
        p.grad_dtype = torch.float32
    with tile_layers(model, ROWS):
        ours = run(model)
    with tile_layers(plain, ROWS):
        rounded = run(plain)
    weight = "layers.1.mlp.up_proj.weight"
    assert ours[weight].dtype == torch.float32 and torch.equal(ours[weight].bfloat16(), rounded[weight])
    assert not torch.equal(ours[weight], rounded[weight].float())


def test_under_autocast():
    truth_model = make_model("llama", torch.float64)
    truth_model.load_state_dict(make_model("llama").state_dict())
    with TrueFloat64():
        truth = run(truth_model)
    results = []
    for tiled in (False, True):
        model = checkpointed(make_model("llama"))
        if tiled:
            tile_layers(model, 16)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run(model))
    for name in truth:
        check_budget(name, results[1][name], results[0][name], truth[name])


def lora(dropout):
    peft = pytest.importorskip("peft")
    model = make_model("llama")
    torch.manual_seed(3)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=dropout, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def run_peft(model, seed=9):
    torch.manual_seed(seed)
    return run(model.get_base_model())


def test_adapters_alone_get_gradients():
    expected = run_peft(lora(0.0))
    with tile_layers(model := lora(0.0), ROWS):
        ours = run_peft(model)
    assert ours.keys() == expected.keys() and any("lora" in name for name in ours)
    assert all("lora" in name for name in ours if name != "hidden")
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()))


def test_dropout_draws_the_same_masks_in_the_backward():
    """With one tile the masks are those of the untiled model, with several those of the tiled one without checkpointing."""
    expected = run_peft(lora(0.3))
    for rows in (LAYOUT.length, ROWS):
        results = []
        for checkpointing in (False, True):
            model = lora(0.3)
            if checkpointing:
                checkpointed(model.get_base_model())
            with tile_layers(model, rows):
                results.append(run_peft(model))
                after = torch.rand(1)
            torch.manual_seed(9)
        assert all(torch.equal(results[0][name], results[1][name]) for name in expected)
        if rows == LAYOUT.length:
            for name in expected:
                scale = float(expected[name].abs().max())
                torch.testing.assert_close(results[0][name], expected[name], rtol=1e-4, atol=1e-5 * scale)
        assert after.isfinite()


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_composes_with_offload_bitwise(tier, tmp_path):
    with tile_layers(model := checkpointed(make_model("qwen3")), ROWS):
        expected = run(model)
    options = dict(host_bytes=1 << 20) if tier == "host" else dict(host_bytes=0, spill_dir=tmp_path)
    model = make_model("qwen3")
    with (
        tile_layers(model, ROWS),
        offload_activations(model, page_bytes=4096, save_attention=True, **options) as handle,
    ):
        ours = run(model)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
        assert handle.used_bytes == 0 and {m.tier for m in handle.moves} == {tier}


def test_composes_with_compiled_parts():
    torch._dynamo.reset()
    expected = run(make_model("llama"))
    model = checkpointed(make_model("llama"))
    for layer in model.model.layers:
        layer.mlp.compile(backend="aot_eager")
    with tile_layers(model, ROWS):
        ours = run(model)
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_batches_keep_their_mask(attention):
    ids = torch.cat([make_ids(), make_ids().flip(1)])
    mask = torch.ones_like(ids)
    mask[1, -20:] = 0
    model = make_model("mistral, window", attention=attention)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    with tile_layers(model, ROWS):
        ours = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


def test_generation_and_no_grad_work():
    model = make_model("gemma3").eval()
    with torch.no_grad():
        expected = model(make_ids(), use_cache=False).logits
        text = model.generate(make_ids()[:, :9], max_new_tokens=6, do_sample=False)
        with tile_layers(model, ROWS):
            torch.testing.assert_close(model(make_ids(), use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(model.generate(make_ids()[:, :9], max_new_tokens=6, do_sample=False), text)


def test_retained_graphs_give_the_same_again():
    model = make_model("llama")
    with tile_layers(checkpointed(model), ROWS):
        hidden = model.model(make_ids(), use_cache=False).last_hidden_state
        results = []
        for _ in range(2):
            model.zero_grad()
            hidden.sum().backward(retain_graph=True)
            results.append([p.grad.clone() for p in model.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_handle_gives_the_forwards_back():
    model = make_model("llama")
    expected = run(model)
    handle = tile_layers(model, ROWS)
    with pytest.raises(ValueError, match="tiled already"):
        tile_layers(model, ROWS)
    handle.remove()
    handle.remove()
    assert all("forward" not in module.__dict__ for module in model.modules())
    again = run(model)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="Linear"):
        tile_layers(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="rows=0: expected a whole number of rows per tile"):
        tile_layers(make_model("llama"), rows=0)
