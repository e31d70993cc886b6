"""benchmarks/training/step.py and plot.py in rehearsal: every variant runs, the layouts are what they say, the figure draws."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import plot
from benchmarks.training import step
from benchmarks.training.step import TINY, VARIANTS, pair_rows, perform, useful_operations
from longpo_ops.memory import pieces
from longpo_ops.memory.optimizer import AdamW
from longpo_ops.memory.plan import GIB, Machine
from longpo_ops.memory.search import placed


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("step")
    assert step.main(["--rehearse", "--out", str(out)]) == 0
    (file,) = out.glob("step_*.json")
    return json.loads(file.read_text())


def test_every_variant_is_measured_and_stamped(report):
    assert [row["variant"] for row in report["rows"]] == list(VARIANTS)
    assert {row["status"] for row in report["rows"]} == {"measured"}
    assert report["rehearsal"] is True and report["state"] == "finished"
    assert report["versions"]["torch"] and report["hardware"] and report["date"]
    for row in report["rows"]:
        assert row["seconds"] > 0 and row["peak_host_bytes"] > 0
        assert row["tokens_per_s"] == pytest.approx(TINY.length / row["seconds"])
        assert row["tflops"] == pytest.approx(useful_operations(TINY) / row["seconds"] / 1e12)
    offloaded = next(row for row in report["rows"] if row["variant"] == "all features")
    assert offloaded["settings"]["on_host"] == TINY.config().num_hidden_layers


def test_shared_and_separate_rows_hold_the_same_sequences():
    shape = replace(TINY, length=40, tail=6)
    losses = []
    from transformers import AutoModelForCausalLM

    from longpo_ops.attention import use_shared_prefix
    from longpo_ops.ops.head import attach

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.float64)
    use_shared_prefix(model)
    attach(model)
    for shared in (True, False):
        ids, positions, layout, labels, sequences = pair_rows(shape, shared)
        assert len(ids) == len(positions) == len(labels) == layout.length

        def logps(hidden, head, sequences=sequences, labels=labels):
            from longpo_ops import linear_logprobs

            values = head(hidden[0], labels, loss=linear_logprobs)
            return torch.stack([values[sequences == k].sum() for k in (0, 1)])

        call = dict(position_ids=positions[None], shared_prefix_layout=layout, use_cache=False)
        losses.append(model(input_ids=ids[None], compute=logps, **call))
        assert [int((sequences == k).sum()) for k in (0, 1)] == [6, 5]
    assert torch.allclose(losses[0], losses[1], rtol=1e-9)


def test_backward_of_some_layers_stops_there():
    told = []
    row = perform(replace(TINY, backward_layers=1, steps=1), "all features", told.append)
    assert row["status"] == "measured" and "tflops" not in row
    assert "backward of layer 2 done" in told and "backward of layer 1 done" not in told


def test_first_layers_only():
    assert replace(TINY, layers=2).config().num_hidden_layers == 2
    assert perform(replace(TINY, layers=2, steps=1), "float32 states")["status"] == "measured"


def test_what_breaks_is_reported(monkeypatch):
    monkeypatch.setattr(AdamW, "step", lambda self: 1 / 0)
    assert perform(TINY, "float32 states")["status"].startswith("failed: ZeroDivisionError")


def test_useful_operations_are_those_of_the_formula():
    config, n = TINY.config(), TINY.length
    layer = 64 * (64 + 2 * 32 + 64) + 3 * 64 * 160
    from longpo_ops.memory.times import attention_pairs

    attention = 4 * 4 * 16 * attention_pairs(n, (TINY.tail,))
    expected = 3 * (6 * n * layer + 3.5 * attention) + 6 * n * config.vocab_size * 64
    assert useful_operations(TINY) == pytest.approx(expected)


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert step.main([]) == 1
    assert "--rehearse" in capsys.readouterr().out


def test_plot_draws_measured_steps_and_no_rehearsals(report, tmp_path, capsys):
    file = tmp_path / "step_2000-01-01_x_tiny_256.json"
    file.write_text(json.dumps(report))
    assert plot.main(["--results", str(tmp_path)]) == 1
    assert "no measured step" in capsys.readouterr().out
    for length in (256, 512):
        told = report | {"rehearsal": False, "shape": asdict(replace(TINY, length=length))}
        (tmp_path / f"step_2000-01-01_x_tiny_{length}.json").write_text(json.dumps(told))
    assert plot.main(["--results", str(tmp_path), "--out", str(tmp_path / "figure.png")]) == 0
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert [p["length"] for p in plot.read(tmp_path)["tiny: all features"]] == [256, 512]


def test_without_torchao_variants_are_skipped_and_the_command_passes(tmp_path, monkeypatch):
    def missing():
        raise ValueError("states='8bit' needs torchao")

    step.no_8bit_states.cache_clear()
    monkeypatch.setattr(pieces, "_torchao", missing)
    try:
        assert (
            step.main(
                ["--rehearse", "--variant", "all features", "--variant", "float32 states", "--out", str(tmp_path)]
            )
            == 0
        )
    finally:
        step.no_8bit_states.cache_clear()
    (file,) = tmp_path.glob("step_*.json")
    skipped, measured = json.loads(file.read_text())["rows"]
    assert skipped["status"] == "skipped: no 8-bit states: states='8bit' needs torchao"
    assert measured["status"] == "measured"


def test_a_single_step_has_states_and_pages_before_it(monkeypatch):
    shape, told, seen = replace(TINY, steps=1), [], {}
    plan = placed(shape.work(), replace(step.ALL, tile_rows=64, states="float32"), Machine(1, GIB, host_reserve=0))
    warm_up = step._warm_up

    def watched(model, optimizer, loss, offloaded, device):
        seconds = warm_up(model, optimizer, loss, offloaded, device)
        seen["states"] = [bool(optimizer.state[weight]) for weight in model.parameters()]
        seen["bytes"] = offloaded.host_bytes, offloaded.used_bytes
        return seconds

    monkeypatch.setattr(step, "_warm_up", watched)
    row = step.measure_plan(shape, plan, told.append)
    assert told[:2] == ["warm-up", "step 0"] and row["warm_up_seconds"] > 0
    assert all(seen["states"]) and len(seen["states"]) > 3
    assert seen["bytes"] == (plan.host["layer inputs"] + plan.host["attention outputs"], 0)
    assert told[2:] == [f"forward of layer {n} of 3" for n in range(3)] + [
        f"backward of layer {n} done" for n in (2, 1, 0)
    ]


def test_each_step_of_a_part_ends_where_it_is_to_end():
    told = []
    assert perform(replace(TINY, backward_layers=1, steps=3), "float32 states", told.append)["status"] == "measured"
    assert told.count("backward of layer 2 done") == told.count("forward of layer 0 of 3") == 3
    assert "backward of layer 1 done" not in told


def test_only_the_first_layer_and_then_all_again():
    model = step.make_model(TINY)
    with pytest.raises(ZeroDivisionError), step.only_first_layer(model):
        assert len(model.get_decoder().layers) == 1
        raise ZeroDivisionError
    assert len(model.get_decoder().layers) == 3
