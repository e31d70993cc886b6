"""Offload: bitwise plain checkpointing, in order, one layer ahead, with memory reused and nothing left behind."""

import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longpo_ops.attention import use_shared_prefix
from longpo_ops.memory import Placement, offload, offload_activations, place, tiers
from longpo_ops.memory.stored import WORKERS

from .lanes import LateLane
from .models import (
    INPUT_BYTES,
    LAYERS,
    LENGTH,
    PAGE,
    PAGES,
    gradients,
    loss_of,
    make_ids,
    make_model,
    plain_step,
    same,
    step,
)
from .test_tile_proof import make_model as make_structure
from .test_tile_proof import run as run_structure

HOST_ALL = LAYERS * PAGES * PAGE
BUDGETS = {  # device_bytes, host_bytes, on disk?, tiers
    "host": (0, HOST_ALL, False, "h h h h h"),
    "device and host": (2 * INPUT_BYTES + 100, HOST_ALL, False, "h h h k k"),
    "device": (LAYERS * INPUT_BYTES, 0, False, "k k k k k"),
    "disk": (0, 0, True, "d d d d d"),
    "all three": (INPUT_BYTES, 2 * PAGES * PAGE, True, "h d h d k"),
}
TIER = {"h": "host", "d": "disk", "k": "device"}


def attach(model, folder=None, device=0, host=HOST_ALL, **options):
    return offload_activations(
        model, device_bytes=device, host_bytes=host, spill_dir=folder, page_bytes=PAGE, **options
    )


@pytest.mark.quick
@pytest.mark.parametrize("budget", BUDGETS)
def test_is_bitwise_plain_checkpointing(budget, tmp_path):
    device, host, disk, places = BUDGETS[budget]
    expected = plain_step(make_model())
    model = make_model()
    with attach(model, tmp_path if disk else None, device, host) as handle:
        assert same(step(model), expected)
        left = [m for m in handle.moves if m.what in ("out", "keep")]
        assert [m.layer for m in left] == list(range(LAYERS))
        assert [m.tier for m in left] == [TIER[t] for t in places.split()]
        assert all(m.nbytes == INPUT_BYTES for m in left)
        assert same(step(model), expected)
        assert handle.used_bytes == 0
        assert handle.host_bytes == places.count("h") * PAGES * PAGE
        assert handle.disk_bytes == places.count("d") * PAGES * PAGE
    assert handle.host_bytes == handle.disk_bytes == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("budget", ["host", "disk"])
def test_brings_back_one_layer_ahead(budget, tmp_path):
    device, host, disk, _ = BUDGETS[budget]
    model = make_model()
    with attach(model, tmp_path if disk else None, device, host) as handle:
        step(model)
        back = [(m.what, m.layer) for m in handle.moves if m.what in ("in", "use")]
    last = LAYERS - 1
    expected = [("in", last)]
    for layer in range(last, 0, -1):
        expected += [("in", layer - 1), ("use", layer)]
    assert back == [*expected, ("use", 0)]


def test_recomputed_layers_are_bitwise_the_same(tmp_path):
    def outputs(model):
        seen = []
        hooks = [
            layer.self_attn.register_forward_hook(lambda *a: seen.append(a[2][0].detach()))
            for layer in model.model.layers
        ]
        step(model)
        for hook in hooks:
            hook.remove()
        return seen

    plain, model = make_model(), make_model()
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    with attach(model, tmp_path, host=2 * PAGES * PAGE):
        ours = outputs(model)
    assert len(ours) == 2 * LAYERS  # forward and recomputation
    assert same(ours, outputs(plain))


def test_pages_are_reused_across_steps_and_lengths(monkeypatch):
    made, make_slab = [], tiers.make_slab
    monkeypatch.setattr(tiers, "make_slab", lambda *args: made.append(args) or make_slab(*args))
    model = make_model()
    with attach(model) as handle:
        for length in (LENGTH, 17, 31, LENGTH, 5):
            step(model, make_ids(length))
        assert len(made) == LAYERS * PAGES and set(made) == {(PAGE, False)}
        assert handle.host_bytes == HOST_ALL and handle.used_bytes == 0


def test_all_pages_can_be_made_ahead(monkeypatch):
    made, make_slab = [], tiers.make_slab
    monkeypatch.setattr(tiers, "make_slab", lambda *args: made.append(args) or make_slab(*args))
    model = make_model()
    with attach(model, host=HOST_ALL + 2 * PAGE) as handle:
        handle.reserve()
        assert handle.host_bytes == HOST_ALL + 2 * PAGE and handle.used_bytes == 0
        count = len(made)
        step(model)
        handle.reserve()
        assert len(made) == count == LAYERS * PAGES + 2


def test_gradient_accumulation_and_two_graphs_at_once(tmp_path):
    model, plain = make_model(), make_model()
    first, second = make_ids(seed=1), make_ids(31, seed=2)
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    for ids in (first, second):
        loss_of(plain, ids).backward()
    expected = gradients(plain)
    with attach(model, tmp_path, host=3 * PAGES * PAGE, device=INPUT_BYTES) as handle:
        for ids in (first, second):
            loss_of(model, ids).backward()
        assert same(gradients(model), expected)
        for order in (0, 1):
            model.zero_grad()
            losses = [loss_of(model, first), loss_of(model, second)]
            kept = [m for m in handle.moves if m.what == "keep"]
            assert kept[-1].nbytes == INPUT_BYTES  # the device budget went to the first graph alone
            losses.pop(order).backward()
            losses.pop().backward()
            if order == 0:  # the same order of summation
                assert same(gradients(model), expected)
        del losses
        assert handle.used_bytes == 0


@pytest.mark.parametrize("budget", ["host", "disk"])
def test_retain_graph_brings_everything_back_twice(budget, tmp_path):
    device, host, disk, _ = BUDGETS[budget]
    model = make_model()
    expected = plain_step(make_model())[1:]
    with attach(model, tmp_path if disk else None, device, host) as handle:
        loss = loss_of(model)
        loss.backward(retain_graph=True)
        assert same(gradients(model), expected)
        assert handle.used_bytes == HOST_ALL
        model.zero_grad()
        loss.backward()
        assert same(gradients(model), expected)
        assert handle.used_bytes == 0
        assert [m.layer for m in handle.moves if m.what == "use"] == [*range(LAYERS - 1, -1, -1)] * 2


def test_a_graph_that_is_dropped_gives_its_memory_back(tmp_path):
    model = make_model()
    with attach(model, tmp_path, host=PAGES * PAGE) as handle:
        loss = loss_of(model)
        assert handle.used_bytes == HOST_ALL
        del loss
        let_workers_finish(handle)
        assert handle.used_bytes == 0


def let_workers_finish(handle):
    """Pages that a thread is still writing or reading are given back when it is done."""
    workers = handle._offloader.mover.workers
    if workers:
        barrier = threading.Barrier(WORKERS + 1)
        for _ in range(WORKERS):
            workers.submit(barrier.wait)
        barrier.wait()


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("budget", ["host", "disk", "all three"])
@pytest.mark.parametrize("where", ["forward", "recomputation", "backward", "loss"])
def test_an_exception_leaves_nothing_behind(where, budget, tmp_path):
    device, host, disk, _ = BUDGETS[budget]
    model, expected = make_model(), plain_step(make_model())
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == (2 if where == "recomputation" else 1):
            raise Broken

    def fail_in_backward(module, inputs, output):
        output.register_hook(fail)

    target = model.model.layers[2].mlp.up_proj
    with attach(model, tmp_path if disk else None, device, host) as handle:
        if where == "loss":
            hook = model.lm_head.register_forward_hook(fail)
        elif where == "backward":
            hook = target.register_forward_hook(fail_in_backward)
        else:
            hook = target.register_forward_hook(fail)
        with pytest.raises(Broken):
            step(model)
        hook.remove()
        torch.ones(1, requires_grad=True).backward()  # PyTorch keeps what was queued on this thread until its next turn
        let_workers_finish(handle)
        assert handle.used_bytes == 0
        assert same(step(model), expected)
    assert list(tmp_path.iterdir()) == []


def test_no_grad_and_eval_offload_nothing():
    model = make_model()
    expected = make_model()(make_ids()).logits
    with attach(model) as handle:
        with torch.no_grad():
            assert torch.equal(model(make_ids(), use_cache=False).logits, expected)
        assert torch.equal(model.eval()(make_ids()).logits, expected)
        assert handle.moves == [] and handle.host_bytes == 0
        model.train()
        assert same(step(model), plain_step(make_model()))


@pytest.mark.parametrize("store", ["exact", "int8"])
@pytest.mark.parametrize("budget", ["host", "disk", "all three"])
def test_waits_for_copies_that_come_late(budget, store, tmp_path, monkeypatch):
    """The order that a CUDA stream relies on: nothing is used before its copy was waited for."""
    device, host, disk, _ = BUDGETS[budget]
    prompt = make_model()
    with attach(prompt, tmp_path if disk else None, device, host, store=store):
        expected = step(prompt)
    monkeypatch.setattr(offload, "lane_of", lambda device: LateLane())
    model = make_model()
    with attach(model, tmp_path if disk else None, device, host, store=store) as handle:
        for _ in range(2):
            assert same(step(model), expected)
        assert handle.used_bytes == 0


def test_holds_an_input_until_its_copy_is_done_and_no_longer(monkeypatch):
    lane = LateLane()
    monkeypatch.setattr(offload, "lane_of", lambda device: lane)
    model, inputs = make_model(), []
    watch = lambda module, args: inputs.append(weakref.ref(args[0].untyped_storage()))  # noqa: E731
    hooks = [layer.register_forward_pre_hook(watch) for layer in model.model.layers]
    with attach(model):
        loss = loss_of(model)
        # All inputs but the last have been waited for, when the next layer's was sent, and are gone from the device.
        assert lane.done == (LAYERS - 1) * PAGES and len(lane.queue) == PAGES
        assert [ref() is not None for ref in inputs] == [False] * (LAYERS - 1) + [True]
        for hook in hooks:
            hook.remove()
        loss.backward()
        assert not lane.queue and inputs[-1]() is None


def test_notices_a_change_in_place():
    model = make_model()

    def change(module, args, output):
        args[0].add_(1)

    with attach(model):
        hook = model.model.layers[1].register_forward_hook(change)
        with torch.enable_grad(), pytest.raises(RuntimeError, match=r"layer 1, .* modified in place"):
            step(model)
        hook.remove()
        assert same(step(model), plain_step(make_model()))


def test_int8_stores_half_and_stays_close(tmp_path):
    model, expected = make_model(), plain_step(make_model())
    with attach(model, store="int8") as handle:
        ours = step(model)
        assert {m.nbytes for m in handle.moves} == {2 * LENGTH * 64 // 128 * (128 + 4)}
    assert torch.equal(ours[0], expected[0])  # the forward does not see it
    for a, b in zip(ours[1:], expected[1:], strict=True):
        assert 0 < (a - b).norm() < 0.02 * b.norm() or torch.equal(a, b)


# --- attention outputs ------------------------------------------------------------------------------------------------

CPU_FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
OUTPUT_PAGES = PAGES + 1  # and those of the logsumexp: 2 x 4 heads x 48 float32


class KernelCalls(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name() == CPU_FLASH
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _small_results_count(monkeypatch):
    monkeypatch.setattr("longpo_ops.memory.attention_outputs.SMALL", 64)


def attention_calls(subject, run=step):
    with KernelCalls() as calls:
        result = run(subject)
    return calls.count, result


@pytest.mark.parametrize("shared_prefix", [False, True])
@pytest.mark.parametrize("fits", [0, 2, LAYERS])
def test_saved_attention_is_not_computed_again(fits, shared_prefix, tmp_path):
    plain, model = make_model(), make_model()
    if shared_prefix:
        use_shared_prefix(plain), use_shared_prefix(model)
    count, expected = attention_calls(plain, plain_step)
    assert count == 2 * LAYERS
    with attach(model, host=HOST_ALL + fits * OUTPUT_PAGES * PAGE, save_attention=True) as handle:
        for _ in range(2):
            count, ours = attention_calls(model)
            assert count == 2 * LAYERS - fits
            assert same(ours, expected)
        assert handle.used_bytes == 0


def test_saved_attention_on_disk_and_a_retained_graph(tmp_path):
    model, expected = make_model(), plain_step(make_model())[1:]
    with attach(model, tmp_path, host=0, save_attention=True) as handle:
        loss = loss_of(model)
        for _ in range(2):
            model.zero_grad()
            count, _ = attention_calls(loss, lambda loss: loss.backward(retain_graph=True))
            assert count == 0 and same(gradients(model), expected)
        del loss
        let_workers_finish(handle)
        assert handle.used_bytes == 0


# --- composition ------------------------------------------------------------------------------------------------------


def test_composes_with_peft(tmp_path):
    peft = pytest.importorskip("peft")

    def lora():
        model = make_model()
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.2, init_lora_weights=False)
        return peft.get_peft_model(model, config)

    plain, model = lora(), lora()
    plain.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(4)
    expected = step(plain)
    with attach(model, tmp_path, host=2 * PAGES * PAGE) as handle:
        torch.manual_seed(4)
        assert same(step(model), expected)
        assert handle.used_bytes == 0


@pytest.mark.parametrize(
    ("kind", "layers"),
    [("qwen3_next", [2, 3]), ("lfm2", [0, 1]), ("gpt_oss", [0, 1]), ("falcon", [0]), ("gemma4_text", [4, 5])],
)
def test_layers_of_any_kind(kind, layers):
    """Linear attention, convolutions, sinks, attention of their own code, several tensors for each layer."""
    options = {"layer_types": ["conv", "full_attention"]} if kind == "lfm2" else {}
    results = []
    for offloaded in (False, True):
        model = make_structure(kind, layers, **options)
        torch.manual_seed(4)
        if not offloaded:
            results.append(run_structure(model, False))
            continue
        with attach(model, host=1 << 22) as handle:
            results.append(run_structure(model, False))
            assert {m.layer for m in handle.moves} == set(range(len(layers))) and handle.used_bytes == 0
    expected, ours = results
    assert ours.keys() == expected.keys()
    assert all((ours[n] is None) == (b is None) and (b is None or torch.equal(ours[n], b)) for n, b in expected.items())


def test_an_input_by_keyword_is_refused():
    model = make_model()
    with attach(model), pytest.raises(ValueError, match="layer 0 got its input by keyword"):
        model.model.layers[0](hidden_states=torch.zeros(1, 3, 64))


@pytest.mark.parametrize("what", ["layers", "model"])
def test_composes_with_compile(what, tmp_path):
    torch._dynamo.reset()
    plain, model = make_model(), make_model()
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    for m in (plain, model):
        if what == "layers":
            for layer in m.model.layers:
                layer.forward = torch.compile(layer.forward, backend="aot_eager")
    expected = step(plain)
    with attach(model, tmp_path, host=2 * PAGES * PAGE) as handle:
        compiled = torch.compile(model, backend="aot_eager") if what == "model" else model
        for _ in range(2):
            ours = step(compiled)
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert {m.layer for m in handle.moves} == set(range(LAYERS)) and handle.used_bytes == 0


def test_handle_gives_the_former_checkpointing_back():
    model = make_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    before = [(layer.gradient_checkpointing, layer._gradient_checkpointing_func) for layer in model.model.layers]
    handle = attach(model)
    with pytest.raises(ValueError, match="offloaded already"):
        attach(model)
    handle.remove()
    handle.remove()
    assert before == [
        (layer.gradient_checkpointing, layer._gradient_checkpointing_func) for layer in model.model.layers
    ]
    untouched = make_model()
    attach(untouched).remove()
    assert not untouched.model.layers[0].gradient_checkpointing
    step(untouched)


def test_notices_being_replaced():
    model = make_model()
    with attach(model):
        model.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="replaced it"):
            step(model)


# --- placement --------------------------------------------------------------------------------------------------------

SIZES = st.integers(0, 40)


@given(layers=st.integers(1, 50), device=SIZES, host=SIZES, disk=SIZES)
def test_placement_fills_the_nearest_tier_first(layers, device, host, disk):
    budgets = dict(device_bytes=device * 100 + 99, host_bytes=host * PAGE + 7, disk_bytes=disk * PAGE)
    try:
        placement = place(layers, 100, page_bytes=PAGE, **budgets)
    except ValueError:
        assert device + host + disk < layers
        return
    assert sum(placement) == layers
    assert placement.device == min(device, layers)
    assert placement.host == min(host, layers - placement.device) and placement.disk <= disk
    places = placement.tiers()
    assert [places.count(t) for t in ("device", "host", "disk")] == list(placement)
    assert places[layers - placement.device :] == ["device"] * placement.device


def test_what_goes_to_disk_is_spread_evenly():
    assert Placement(1, 4, 2).tiers() == ["host", "host", "disk", "host", "host", "disk", "device"]
