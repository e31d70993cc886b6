"""Plans of separate sequences, one forward each and one backward for all: predictions against what the allocator gave."""

from contextlib import ExitStack

import pytest
import torch

from longpo_ops.data import pack
from longpo_ops.memory import offload_activations
from longpo_ops.memory.adapters import Adapters
from longpo_ops.memory.mesh import Mesh
from longpo_ops.memory.optimizer import OPTIMS
from longpo_ops.memory.plan import ERROR, Settings, Work, predict
from longpo_ops.memory.sequences import Sequences
from longpo_ops.memory.tiers import PAGE
from longpo_ops.ops.head import attach
from longpo_ops.ops.logprobs import linear_cross_entropy
from longpo_ops.pretrained import plain_parts
from longpo_ops.train.forward import run

from ..train.tiny import make_pair
from .models import small
from .test_plan import GIB, allocated, machine, put_on

CPU = torch.device("cpu")


def measured(work: Work, settings: Settings, pair) -> int:
    """Peak bytes of the second step of a real model, weights and optimizer states included."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(work.config, dtype=work.dtype).train()
    if work.adapters:
        put_on(model, work.adapters)
    attach(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMS[work.optim](trained, lr=1e-3)
    batch = pack([pair], separate=True)
    tokens, given = batch.input_ids[0], dict(loss=linear_cross_entropy, workspace_bytes=work.workspace_bytes)

    def step() -> None:
        for _ in range(work.accumulation):
            run(model, batch, lambda hidden, head: head(hidden, tokens, **given), CPU)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    with ExitStack() as stack:
        if settings.offload:
            nbytes = work.length * work.row_bytes
            where = {"device_bytes": settings.kept * nbytes, "host_bytes": 8 * nbytes, "page_bytes": 1 << 16}
            stack.enter_context(offload_activations(model, **where))
        step()
        resident = sum(part.nbytes for p in model.parameters() for part in plain_parts(p))
        resident += sum(t.nbytes for w in optimizer.state_dict()["state"].values() for t in w.values())
        return resident + allocated(step)


def work_of(config, lengths, **more) -> Work:
    given = dict(dtype=torch.float32, workspace_bytes=8 << 20, separate=Sequences.of([lengths], "sdpa"))
    return Work(config, sum(lengths), **given | more)


CASES = {
    "two": (1, {}, Settings()),
    "several packs": (1, {"accumulation": 2}, Settings()),
    "adapters": (1, {"adapters": Adapters(8)}, Settings()),
    "some offloaded": (2, {}, Settings(offload=True, kept=1, on_host=3)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_separate_sequences(case):
    rejected, more, settings = CASES[case]
    pair = make_pair(0, turns=1, document=1000, rejected=rejected)
    lengths = [len(sequence) for sequence in (pair.chosen, *pair.rejected)]
    work = work_of(small(intermediate_size=1024), lengths, **more)
    predicted, real = predict(work, settings, machine(GIB)).peak, measured(work, settings, pair)
    assert abs(predicted.total / real - 1) < ERROR, (predicted, real)


def test_what_others_keep_is_beside_what_the_longest_needs():
    config, lengths = small(), (100, 300, 200)
    one, three = (predict(work_of(config, each), Settings(), machine(GIB)) for each in ((300,), lengths))
    packed = predict(Work(config, 300, dtype=torch.float32, workspace_bytes=8 << 20), Settings(), machine(GIB))
    assert one.phases == packed.phases
    forward = {phase.name: phase.parts["layer inputs"] for phase in three.phases}
    row = 128 * 4
    assert forward["forward 0"] == (4 * 400 + 200) * row and forward["loss"] == 4 * 600 * row
    assert three.seconds["loss"] == pytest.approx(2 * one.seconds["loss"])
    away = predict(work_of(config, lengths), Settings(offload=True, on_host=4), machine(GIB))
    assert away.host["layer inputs"] == 4 * PAGE + 3 * 4 * PAGE + 300 * row
    assert Sequences.of([(5, 6), (9, 1, 2)], "sdpa") == Sequences(9, 10, 3, "sdpa")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: work_of(small(), (64, 64), mesh=Mesh(2)), "separate sequences: planned on one card, and 2 came"),
        (lambda: work_of(small("mistral", sliding_window=32), (64,)), "4 layers see fewer than the 64 tokens"),
        (lambda: work_of(small(), (64,), separate=Sequences(64, attention="eager")), "makes scores of rows x rows"),
        (lambda: work_of(small(), (64,), separate=(64,)), "expected a Sequences"),
        (lambda: Sequences(0), "separate: longest=0: expected an int >= 1"),
    ],
)
def test_what_is_not_planned_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
