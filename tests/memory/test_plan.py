"""The planner: predictions against what the allocator really gave, and the search."""

import dataclasses
import gc
from contextlib import ExitStack

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from longpo_ops.attention import use_shared_prefix
from longpo_ops.memory import offload_activations, place, tile_layers
from longpo_ops.memory.host_memory import gib
from longpo_ops.memory.optimizer import OPTIMS, PIECE, AdamW
from longpo_ops.memory.pieces import BLOCK
from longpo_ops.memory.plan import (
    ERROR,
    STEP_BYTES,
    STEP_COSTS,
    Machine,
    Settings,
    Work,
    predict,
    weights_of,
)
from longpo_ops.memory.search import fit, longest, lossy_offers, placed
from longpo_ops.memory.times import attention_pairs
from longpo_ops.memory.trace import carried_models, read_config, trace
from longpo_ops.ops.head import attach
from longpo_ops.ops.logprobs import linear_cross_entropy
from longpo_ops.pretrained import build_empty, plain_parts

from .models import small

GIB = 1 << 30
ROWS = 2048


# -- prediction against measurement ----------------------------------------------------------------------------------


def allocated(run) -> int:
    """Peak bytes that the CPU allocator gave out within run(), beyond those at its start."""
    gc.collect()  # what is left of an earlier measurement is freed now: within it would count against the peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    level = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def test_what_was_measured_before_counts_for_nothing():
    def leave() -> None:  # in a circle, which only the next search for garbage frees
        left = [torch.ones(1 << 20)]
        left.append(left)

    assert allocated(leave) == 4 << 20
    assert allocated(lambda: (gc.collect(), torch.ones(1 << 20))) == 4 << 20


def put_on(model, adapters) -> None:
    """Adapters on weights that are quantised by torchao, where they are to be in 8 bits."""
    if adapters.quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model.model, Int8WeightOnlyConfig())
    dataclasses.replace(adapters, quantization="none").put_on(model)


def measured(work: Work, settings: Settings) -> int:
    """Peak bytes of the second step of a real model, weights and optimizer states included."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(work.config, dtype=work.dtype).train()
    if work.adapters:
        put_on(model, work.adapters)
    use_shared_prefix(model)
    attach(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    early = settings.step_in_backward
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMS[work.optim](trained, lr=1e-3, states=settings.states, step_in_backward=early)
    tokens = torch.randint(work.config.vocab_size, (1, work.length))

    def step() -> None:
        def loss(hidden, head):
            return head(hidden[0], tokens[0], loss=linear_cross_entropy, workspace_bytes=work.workspace_bytes)

        for _ in range(work.accumulation):
            model(input_ids=tokens.clone(), use_cache=False, compute=loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    with ExitStack() as stack:
        if settings.tile_rows:
            stack.enter_context(tile_layers(model, settings.tile_rows))
        if settings.offload:
            input_bytes = work.length * work.config.hidden_size * work.dtype.itemsize
            stack.enter_context(
                offload_activations(
                    model,
                    device_bytes=settings.kept * input_bytes,
                    host_bytes=4 * input_bytes,
                    store=settings.store,
                    page_bytes=1 << 16,
                )
            )
        step()
        resident = sum(part.nbytes for p in model.parameters() for part in plain_parts(p))
        resident += sum(t.nbytes for w in optimizer.state_dict()["state"].values() for t in w.values())
        return resident + allocated(step)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(step_in_backward=True),
        Settings(tile_rows=256),
        Settings(tile_rows=256, offload=True, on_host=4),
        Settings(tile_rows=256, offload=True, kept=3, on_host=1, store="int8"),
        Settings(offload=True, on_host=4, step_in_backward=True),
    ],
    ids=["plain", "step-in-backward", "tiled", "offload", "some-in-8-bits", "untiled-offload"],
)
def test_peak_is_within_the_error_that_plans_leave_room_for(settings):
    work = Work(small(), ROWS, dtype=torch.float32, workspace_bytes=8 << 20)
    predicted = predict(work, settings, machine(GIB, disk=GIB)).peak.total
    real = measured(work, settings)
    assert abs(predicted / real - 1) < ERROR, (predicted, real)


@pytest.mark.parametrize("optim", ["adamw_torch", "rmsprop"])
def test_accumulation_holds_the_gradients(optim):
    work = Work(small(), ROWS, accumulation=2, dtype=torch.float32, workspace_bytes=8 << 20, optim=optim)
    predicted = predict(work, Settings(), machine(GIB)).peak.total
    assert abs(predicted / measured(work, Settings()) - 1) < ERROR


# -- what is counted -------------------------------------------------------------------------------------------------


def test_trace_counts_the_products_of_a_layer():
    config, rows = small(), 512
    t = trace(config, rows)
    weights = 128 * (128 + 2 * 64 + 128) + 3 * 128 * 384
    assert t.forward_flops == 2 * rows * weights
    assert t.input == rows * 128 * 2
    down = 2 * rows * 128 * 384  # checkpointing stops recomputing before the last product
    assert t.backward_flops == 3 * t.forward_flops - down


def test_tiling_bounds_what_a_layer_needs():
    config = small(intermediate_size=2048)
    untiled, tiled = (trace(config, 4096, rows) for rows in (None, 256))
    assert tiled.backward < 0.4 * untiled.backward
    assert tiled.forward < 0.4 * untiled.forward


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2"]
)
def test_any_family_can_be_traced(kind):
    t = trace(small(kind, pad_token_id=0), 128)
    assert 0 < t.forward < t.backward


def test_weights_are_the_models():
    from transformers import AutoModelForCausalLM

    for tied in (False, True):
        config = small("qwen2", tie_word_embeddings=tied)
        model = AutoModelForCausalLM.from_config(config)
        w = weights_of(config)
        assert w.total == sum(p.numel() for p in model.parameters())
        assert w.layer == sum(p.numel() for p in model.model.layers[0].parameters())
        assert (w.layers, w.tied, w.embedding) == (4, tied, 512 * 128)


def test_attention_pairs_are_those_of_the_mask():
    for length, tails, window in ((40, (), None), (40, (6,), None), (40, (6, 4), None), (40, (), 8)):
        rows = length - sum(tails)
        prefix = rows - (sum(tails) // len(tails) if tails else 0)
        seen = sum(min(i + 1, window or length) for i in range(rows))
        seen += sum(prefix + i + 1 for tail in tails for i in range(tail))
        assert abs(attention_pairs(length, tails, window) / seen - 1) < 0.06


# -- carried shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mistral-7b", 7.242),
        ("llama-3-8b", 8.030),
        ("qwen2.5-7b", 7.616),
        ("qwen2.5-1.5b", 1.544),
        ("qwen2.5-32b", 32.764),
        ("qwen2.5-72b", 72.706),
        ("mixtral-8x7b", 46.703),
        ("qwen3-30b-a3b", 30.532),
    ],
)
def test_carried_shapes_have_the_published_sizes(name, billions):
    assert name in carried_models()
    assert round(weights_of(read_config(name)).total / 1e9, 3) == billions


def test_unknown_model_is_refused(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="neither one of llama-3-8b, mistral-7b"):
        read_config("no-such-model")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "gpt2",
            "cannot be planned: the planner looks for the layers in `layers` of the body, and a GPT2Model has them",
        ),
        ("opt", "the planner looks for the layers in `layers` of the body, and a OPTModel has them elsewhere"),
        ("falcon", "a model of type 'falcon' cannot be planned: it takes no attention but those of its own code"),
    ],
)
def test_a_model_that_cannot_be_planned_is_built_and_refused_for_what_the_planner_lacks(kind, message):
    config = AutoConfig.for_model(kind, num_hidden_layers=1, hidden_size=64, num_attention_heads=4, vocab_size=128)
    build_empty(config)
    with pytest.raises(ValueError, match=message) as caught:
        weights_of(config)
    assert "mend the file" not in str(caught.value)


def test_a_model_that_sees_is_planned_as_its_text_part(tmp_path):
    from transformers import Gemma3Config, Gemma3TextConfig

    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=704)
    text |= dict(num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    Gemma3Config(text_config=text, dtype="bfloat16").save_pretrained(tmp_path)
    machine = Machine(4 * GIB, 16 * GIB)
    planned, plain = (fit(Work(read_config(c), 512), machine) for c in (tmp_path, Gemma3TextConfig(**text)))
    assert planned.peak == plain.peak and weights_of(read_config(tmp_path)).layers == 2


def test_untiled_forward_of_the_512k_step():
    """Three tensors as wide as the MLP and three as the model are alive at once, at 524,288 rows in bfloat16."""
    for name in ("mistral-7b", "qwen2.5-7b"):
        config = read_config(name)
        t = trace(config, 524288)
        expected = 524288 * 2 * (3 * config.intermediate_size + 3 * config.hidden_size)
        assert abs((t.forward + t.input) / expected - 1) < 0.02


# -- search ----------------------------------------------------------------------------------------------------------


def machine(device, host=GIB, disk=0) -> Machine:
    return Machine(device, host, disk, device_reserve=0, host_reserve=0, error=0.0)


@pytest.fixture(scope="module")
def work():
    return Work(small(num_hidden_layers=16), 65536, max_grad_norm=1.0, workspace_bytes=8 << 20)


def test_plenty_of_memory_needs_nothing(work):
    assert fit(work, machine(64 * GIB, host=0)).settings == Settings()


def test_a_host_that_is_free_saves_recomputing_attention(work):
    plain, saving = (fit(work, machine(64 * GIB, host)) for host in (0, 64 * GIB))
    assert saving.settings.attention_layers > 0
    assert saving.step_seconds < plain.step_seconds


def test_less_memory_takes_more_and_the_prediction_fits(work):
    everything = fit(work, machine(64 * GIB, host=0)).peak.total
    seen = []
    for part in (0.9, 0.6, 0.4):
        plan = fit(work, machine(int(part * everything)), "all")
        assert plan.peak.total <= part * everything
        assert sum(plan.host.values()) <= GIB
        seen.append(plan.settings)
    assert seen[-1].offload and seen[-1].tile_rows
    assert len(set(seen)) > 1


def test_inputs_stay_where_there_is_room_then_host_then_disk(work):
    settings = Settings(tile_rows=8192, offload=True)
    t = trace(work.config, work.length, 8192)
    bare = predict(work, dataclasses.replace(settings, on_host=16), machine(GIB)).peak.total
    page = -(-t.input // (16 << 20)) * (16 << 20)
    plan = placed(work, settings, machine(bare + 5 * t.input, 4 * page + page // 2, GIB))
    s = plan.settings
    assert not plan.shortfalls
    assert s.kept >= 5 and s.on_host == 4 and s.on_disk == 16 - 4 - s.kept and s.attention_layers == 0
    more = placed(work, settings, machine(bare + 5 * t.input, GIB, GIB))
    assert more.settings.on_disk == 0 and more.settings.attention_layers > 0
    assert more.step_seconds < plan.step_seconds


def test_stepping_in_backward_only_where_it_is_allowed_and_needed(work):
    free = dataclasses.replace(work, max_grad_norm=0.0)
    assert not fit(free, machine(64 * GIB)).settings.step_in_backward
    with pytest.raises(ValueError, match="max_grad_norm"):
        predict(work, Settings(step_in_backward=True), machine(GIB))
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        predict(dataclasses.replace(free, accumulation=2), Settings(step_in_backward=True), machine(GIB))


def test_nothing_fits_names_the_shortfall(work):
    with pytest.raises(ValueError, match=r"nothing fits. device is short of .*max_grad_norm=0 would let"):
        fit(work, machine(32 << 20))


def test_a_plan_leaves_room_for_the_error_of_its_prediction(work):
    everything = fit(work, machine(64 * GIB, host=0)).peak.total
    reserve = 1 << 20
    exact = Machine(int(everything / (1 - ERROR)) + reserve + 1, 0, device_reserve=reserve, host_reserve=0)
    plan = fit(work, exact)
    assert plan.settings == Settings()
    assert plan.peak.parts["error"] == pytest.approx(ERROR * (plan.peak.total - reserve), rel=1e-6)
    less = fit(work, dataclasses.replace(exact, device_bytes=exact.device_bytes - (1 << 20)))
    assert less.settings != Settings()


def test_a_reference_beside_the_policy_takes_its_bytes(work):
    alone, beside = (
        predict(dataclasses.replace(work, reference_bytes=n), Settings(), machine(GIB)) for n in (0, 12345)
    )
    assert beside.peak.total == alone.peak.total + 12345


def tight(work, states, store):
    """A machine that just holds these settings with all layer inputs on the host."""
    settings = Settings(tile_rows=8192, offload=True, on_host=16, states=states, store=store)
    plan = predict(work, settings, machine(GIB))
    return machine(plan.peak.total, sum(plan.host.values()))


@pytest.mark.parametrize(
    ("states", "store", "allowed"), [("8bit", "exact", "states"), ("float32", "int8", "all")], ids=["states", "inputs"]
)
def test_lossy_storage_is_for_who_asks_for_it(states, store, allowed):
    wide = dict(hidden_size=1024, num_attention_heads=32) if allowed == "states" else {}
    length = 16384 if allowed == "states" else 1 << 18  # inputs of several pages each
    work = Work(small(num_hidden_layers=16, **wide), length, max_grad_norm=1.0, workspace_bytes=8 << 20)
    limits = tight(work, states, store)
    with pytest.raises(ValueError, match=f"nothing fits.*allow_lossy='{allowed}', 8-bit .* would fit"):
        fit(work, limits)
    chosen = fit(work, limits, allowed).settings
    assert (chosen.states, chosen.store) == (states, store)


def test_a_plan_says_what_lossy_storage_would_buy(work):
    work = dataclasses.replace(work, length=1 << 18)  # inputs of several pages each
    settings = Settings(tile_rows=8192, offload=True)
    plan = placed(
        work, settings, machine(predict(work, dataclasses.replace(settings, on_host=16), machine(GIB)).peak.total)
    )
    states, inputs = lossy_offers(plan, "nothing")
    total = weights_of(work.config).total
    less = gib(8 * total - int(2 * (1 + 4 / 256) * total))
    assert states.startswith(f"allow_lossy='states', 8-bit optimizer states, would take {less} less and ")
    assert inputs.startswith("allow_lossy='all', 8-bit layer inputs, would take ")
    assert lossy_offers(plan, "states") == [inputs] and lossy_offers(plan, "all") == []
    plan = placed(work, Settings(offload=True), machine(2**20 * GIB))  # every layer input stays on the device
    offers = lossy_offers(plan, "nothing")
    on_host = predict(work, Settings(host=True), machine(64 * GIB, 64 * GIB))
    slower = (STEP_COSTS[AdamW]["8bit"].host - STEP_COSTS[AdamW]["float32"].host) * total / on_host.machine.host_memory
    assert lossy_offers(on_host, "nothing")[0].endswith(f" less and {slower:.2g} s more a step")
    assert [offer.split(",")[0] for offer in offers] == ["allow_lossy='states'"]
    with pytest.raises(ValueError, match="allow_lossy='some': expected one of nothing, states, all"):
        fit(work, machine(GIB), "some")


def test_rmsprop_holds_half_of_adamws_states_and_none_in_8_bits(work):
    work = dataclasses.replace(work, optim="rmsprop")
    total, there = weights_of(work.config).total, machine(64 * GIB, 64 * GIB)
    on_device, on_host = (predict(work, Settings(host=host), there) for host in (False, True))
    assert on_device.peak.parts["optimizer states"] == on_host.host["optimizer states"] == 4 * total
    assert on_host.seconds["optimizer"] == pytest.approx(107 * total / there.host_memory)
    assert on_device.seconds["optimizer"] == pytest.approx((52 + 66) * total / there.device_memory)
    with pytest.raises(ValueError, match="optim='rmsprop', states='8bit': expected one of float32"):
        predict(work, Settings(states="8bit"), there)
    assert lossy_offers(on_device, "nothing") == []
    none = "allow_lossy='states': 8-bit optimizer states are not to be had with rmsprop"
    assert lossy_offers(on_device, "states") == [none]
    assert fit(work, there, "states").settings == fit(work, there).settings
    adamw = dataclasses.replace(work, optim="adamw_torch")
    just = machine(on_device.peak.total)
    assert not predict(work, Settings(), just).shortfalls
    assert predict(adamw, Settings(), just).shortfalls["device"] >= 4 * total
    with pytest.raises(ValueError, match="optim='sgd': expected one of adamw_torch, adamw_torch_fused, rmsprop"):
        dataclasses.replace(work, optim="sgd")


def test_what_does_not_fit_says_what_8_bits_are_to_be_had():
    work = Work(small(num_hidden_layers=16), 1 << 18, max_grad_norm=1.0, workspace_bytes=8 << 20, optim="rmsprop")
    limits = tight(work, "float32", "int8")
    for allowed, told in (("nothing", ""), ("states", "8-bit optimizer states are not to be had with rmsprop. ")):
        with pytest.raises(ValueError, match=f"nothing fits.*{told}allow_lossy='all', 8-bit layer inputs, would fit"):
            fit(work, limits, allowed)
    assert fit(work, limits, "all").settings.store == "int8"


def test_longest_length_fits_and_the_next_does_not():
    work = Work(small(num_hidden_layers=8), 1, max_grad_norm=1.0, workspace_bytes=8 << 20)
    limits = machine(96 << 20, 64 << 20)
    plan = longest(work, limits, unit=512)
    assert not plan.shortfalls and plan.work.length % 512 == 0
    with pytest.raises(ValueError, match="nothing fits"):
        fit(dataclasses.replace(work, length=plan.work.length + 512 + plan.work.length // 16), limits)


def test_a_step_on_the_host_takes_its_work_or_its_copies_whichever_is_slower():
    config = small(num_hidden_layers=8, hidden_size=512, vocab_size=1 << 17)  # its embedding has four pieces
    work, total = Work(config, 4096), weights_of(config).total
    here = Machine(64 * GIB, 64 * GIB, copy=50e9, host_memory=100e9)
    on_host = Settings(host=True)
    plan = predict(work, on_host, here)
    assert plan.seconds["optimizer"] == pytest.approx(87 * total / 100e9)
    slow = dataclasses.replace(here, copy=1e9)
    assert predict(work, on_host, slow).seconds["optimizer"] == pytest.approx(6 * total / 1e9)
    summed = dataclasses.replace(work, accumulation=2)  # gradients in float32
    assert predict(summed, on_host, slow).seconds["optimizer"] == pytest.approx(8 * total / 1e9)
    rooms = 2 * PIECE * (2 + 4)
    assert plan.host["optimizer scratch"] == rooms + STEP_BYTES * BLOCK
    compiled = predict(work, dataclasses.replace(on_host, states="8bit"), here)
    assert compiled.host["optimizer scratch"] == rooms + STEP_BYTES * PIECE
    assert not any(phase.parts.get("optimizer scratch") for phase in plan.phases)
    on_device = predict(work, Settings(), here)
    assert on_device.phases[-1].parts["optimizer scratch"] == STEP_BYTES * PIECE
    assert on_device.seconds["optimizer"] == pytest.approx(94 * total / here.device_memory)


def test_bad_lengths_are_refused():
    with pytest.raises(ValueError, match="longer than its rejected tails"):
        Work(small(), 100, tails=(60, 40))
    with pytest.raises(ValueError, match="accumulation=0: expected at least one pack"):
        Work(small(), 100, accumulation=0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Work("gpt2", 100), "config='gpt2': expected a transformers config"),
        (lambda: Work(small(), 100.0), "length=100.0: expected an int >= 1"),
        (lambda: Work(small(), 100, tails=(-5,)), "tails=-5: expected an int >= 1"),
        (lambda: Work(small(), 100, tails=5), "tails: expected several"),
        (lambda: Work(small(), 100, dtype="bfloat16"), "dtype='bfloat16': expected a floating-point torch dtype"),
        (lambda: Work(small(), 100, max_grad_norm=float("nan")), "max_grad_norm=nan"),
        (lambda: Machine(-1), "Machine: device_bytes=-1: expected an int >= 0"),
        (lambda: Machine(GIB, copy=0), "Machine: copy=0: expected a finite number > 0"),
        (lambda: fit(small(), Machine(GIB)), "work: expected a Work, got LlamaConfig"),
        (lambda: fit(Work(small(), 100), GIB), "machine: expected a Machine, got int"),
        (lambda: place(4, 0), "input_bytes=0: expected an int >= 1"),
        (lambda: place(4, 1, host_bytes=-1), "host_bytes=-1: expected an int >= 0"),
    ],
)
def test_other_kinds_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
