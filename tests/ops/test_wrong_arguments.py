"""Every argument of every function, replaced by some 50 values that are wrong for it: each a ValueError that names it.

One table of valid calls, one of values by what they are; what is right for an argument all the same is told by RIGHT. A wrong
number that made no failure would be found here, too: what is accepted must be in RIGHT.
"""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch

from longpo_ops import (
    DPO,
    IPO,
    LOGO,
    ORPO,
    Hinge,
    KTOPair,
    LongPO,
    PreferenceHead,
    SimPO,
    explain_backend,
    fused_preference_loss,
    linear_cross_entropy,
    linear_kl,
    linear_logprobs,
    packed_preference_loss,
)

B, T, H, V, N = 2, 6, 8, 11, 12

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    VALUES = {
        "nothing": [None],
        "text": ["x", "", b"x", np.str_("x")],
        "small int": [5, 1, np.int64(3)],
        "zero": [0],
        "float zero": [0.0],
        "negative": [-1],
        "negative float": [-1.5],
        "half": [0.5, np.float32(0.5), np.float64(0.5)],
        "above one": [1.5, 1e30],
        "large": [2**70],
        "very negative": [-(2**70)],
        "huge": [10**400, 10**5000],
        "flag": [True, False, np.bool_(True)],
        "not finite": [math.nan, math.inf, -math.inf, np.float32("nan")],
        "object": [1j, [1.0, 2.0], [], {}, (1, 2), {1}, np.ones(3), ..., lambda *a: None, object, object(), DPO],
        "dtype": [torch.float32],
        "number in a tensor": [torch.tensor(1.0), torch.tensor(1), torch.tensor(True)],
        "tensor of another shape": [torch.ones(0), torch.ones(3), torch.ones(1, 1, 1, 1, 1), torch.ones(5).long()],
    }  # fmt: skip

ABOVE_ZERO = {"small int", "half", "above one", "large"}
FINITE = ABOVE_ZERO | {"zero", "float zero", "negative", "negative float", "very negative"}
RIGHT = {  # the groups of VALUES that an argument takes
    "shift": {"flag"},
    "reuse_hidden": {"flag"},
    "sparse_hidden_gradient": {"flag"},
    "correct_tokens": {"flag"},
    "average": {"flag"},
    "softcap": ABOVE_ZERO | {"nothing"},
    "teacher_softcap": ABOVE_ZERO | {"nothing"},
    "teacher_scale": ABOVE_ZERO | {"nothing"},
    "scale": ABOVE_ZERO,
    "temperature": ABOVE_ZERO,
    "num_pairs": ABOVE_ZERO | {"nothing"},
    "ignore_index": {"small int", "zero", "negative"},
    "workspace_bytes": {"nothing"},
    "backend": {"nothing"},
    "shards": {"nothing"},
    "group": {"nothing"},
    "device": {"nothing"} | ({"small int", "zero"} if torch.backends.cuda.is_built() else set()),  # its number
    "kind": set(),
    "reduction": set(),
    "objective": set(),
    "num_chosen": set(),
    "gamma": FINITE,
    "preference_weight": ABOVE_ZERO | {"zero", "float zero"},
    "nll_weight": ABOVE_ZERO | {"zero", "float zero"},
    "lam": ABOVE_ZERO | {"zero", "float zero"},
    "dtype": {"dtype"},
    "label_smoothing": {"zero", "float zero"},
    "z_loss_weight": ABOVE_ZERO | {"zero", "float zero"},
    "outputs": set(),
}
OPTIONAL = {
    "bias",
    "teacher_bias",
    "nll_labels",
    "nll_weights",
    "row_weights",
    "class_weights",
    "mask",
    "rejected_pair",
}


def hidden(rows, width=H):
    return torch.randn(rows, width)


def ids(*shape):
    """No two labels in a row are alike, so that no ignore_index takes all of an answer's."""
    return (torch.arange(math.prod(shape)) % V).view(shape)


def preference_head(weight, bias, softcap, scale, **arguments):
    weight, bias = (torch.nn.Parameter(x, False) if isinstance(x, torch.Tensor) else x for x in (weight, bias))
    return PreferenceHead(weight, bias, softcap=softcap, scale=scale)(**arguments, loss=linear_logprobs)


OPTIONS = {"softcap": 5.0, "scale": 1.0, "workspace_bytes": 1 << 26, "backend": "torch", "bias": torch.randn(V)}
OPTIONS["sparse_hidden_gradient"] = False
LABELLED = {"ignore_index": -100} | OPTIONS
REFERENCES = {"ref_chosen_logps": torch.zeros(B), "ref_rejected_logps": torch.zeros(B)}
PAIRS = {"rejected_pair": torch.arange(B), "num_pairs": 2, "reuse_hidden": False} | REFERENCES | LABELLED
ANSWERS = ids(B, T)
CALLS = {
    "fused": (fused_preference_loss, {
        "chosen_hidden": torch.randn(B, T, H), "rejected_hidden": torch.randn(B, T, H), "weight": torch.randn(V, H),
        "chosen_labels": ANSWERS, "rejected_labels": ids(B, T), "nll_labels": ANSWERS.clone(), "shift": True,
        "objective": "hinge"} | PAIRS),
    "packed": (packed_preference_loss, {
        "hidden": hidden(N), "weight": torch.randn(V, H), "labels": ids(N), "sequences": torch.arange(N) // 3,
        "num_chosen": B, "nll_weights": torch.rand(N), "objective": "dpo", "shards": None,
        "correct_tokens": True} | PAIRS),
    "cross-entropy": (linear_cross_entropy, {
        "hidden": hidden(N), "weight": torch.randn(V, H), "labels": ids(N), "row_weights": torch.rand(N),
        "class_weights": torch.rand(V), "label_smoothing": 0.1, "z_loss_weight": 1e-4,
        "reduction": "mean", "temperature": 1.0, "shards": None} | LABELLED),
    "log-probs": (linear_logprobs, {
        "hidden": hidden(N), "weight": torch.randn(V, H), "labels": ids(N), "temperature": 1.0,
        "outputs": ("entropy", "predicted")} | LABELLED),
    "kl": (linear_kl, {
        "hidden": hidden(N), "weight": torch.randn(V, H), "teacher_hidden": hidden(N, 5), "teacher_weight": torch.randn(V, 5),
        "kind": "jsd", "beta": 0.5, "mask": torch.ones(N, dtype=torch.bool), "row_weights": torch.rand(N), "reduction": "none",
        "temperature": 1.0, "teacher_bias": torch.randn(V), "teacher_scale": 1.0, "teacher_softcap": 4.0,
        "group": None} | OPTIONS),
    "head": (preference_head, {
        "weight": torch.randn(V, H), "bias": torch.randn(V), "softcap": 5.0, "scale": 1.0,
        "hidden": hidden(N), "labels": ids(N)}),
    "explain_backend": (explain_backend, {"device": "cpu", "dtype": torch.float32}),
} | {
    cls.__name__: (cls, {field.name: field.default for field in dataclasses.fields(cls)})
    for cls in (LongPO, DPO, IPO, Hinge, KTOPair, SimPO, LOGO, ORPO)
}  # fmt: skip


def right_groups(call: str, name: str, valid) -> set[str]:
    if isinstance(valid, torch.Tensor):
        missing = {"rejected_pair"} if call == "packed" else set()
        return {"nothing"} if name in OPTIONAL - missing else set()
    if name == "beta":
        return {"half"} if call == "kl" else ABOVE_ZERO
    if (call, name) == ("cross-entropy", "label_smoothing"):
        return {"zero", "float zero", "half"}
    return RIGHT[name]


def other_tensors(name: str, valid: torch.Tensor):
    """The argument itself, but of another kind, shape or device, or with numbers that cannot be."""
    dtypes = {torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int8, torch.int32, torch.uint64, torch.int64}
    dtypes |= {torch.float32} if not valid.is_floating_point() else set()
    for dtype in dtypes - {valid.dtype}:
        yield valid.to(dtype)
    yield from (valid[None], valid[:-1], valid.tolist(), valid.numpy(), valid.to_sparse(), valid.to("meta"))
    yield torch.nested.nested_tensor([row.view(-1) for row in valid])
    if valid.dim() == 2:
        yield valid.to_sparse_csr()
    if valid.is_floating_point():
        yield valid.to_mkldnn()
        yield torch.quantize_per_tensor(valid, 0.1, 0, torch.qint8)
    if name in REFERENCES:
        yield from (valid.index_fill(0, torch.tensor([1]), number) for number in (math.nan, math.inf, -math.inf))
    if valid.dtype == torch.int64:
        yield from (torch.full_like(valid, number) for number in (-5, 1 << 40, (1 << 63) - 1, -(1 << 63)))


def named(name: str, message: str) -> bool:
    """Labels are told apart by their place, and tensors that do not fit each other are named by the one that does not."""
    generic = {"chosen_labels", "rejected_labels", "nll_labels", "sequences"}
    others = {"chosen_hidden": "chosen_labels", "rejected_hidden": "rejected_labels", "hidden": "labels"}
    also = {"num_chosen": "ref_chosen_logps", "rejected_pair": "ref_rejected_logps", "teacher_hidden": "rows"} | others
    return name in message or also.get(name, name) in message or (name in generic and message.startswith("labels"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS)
def test_each_wrong_argument_is_a_value_error_that_names_it(call):
    function, valid = CALLS[call]
    function(**valid)
    wrong = []
    for name, value in valid.items():
        right = right_groups(call, name, value)
        values = [(group in right, given) for group, members in VALUES.items() for given in members]
        if isinstance(value, torch.Tensor):
            values += [(False, given) for given in other_tensors(name, value)]
        for accepted, given in values:
            told = f"{call}({name}={type(given).__name__} {str(given)[:60] if not isinstance(given, int) else ''})"
            try:
                function(**valid | {name: given})
            except ValueError as error:
                if accepted:
                    wrong.append(f"{told} is right, but: {error}")
                elif not named(name, str(error)):
                    wrong.append(f"{told} is not named: {error}")
            except Exception as error:
                wrong.append(f"{told}: {type(error).__name__} {str(error)[:100]}")
            else:
                if not accepted:
                    wrong.append(f"{told} is accepted")
    assert not wrong, "\n".join([f"{len(wrong)} of {call}:", *wrong])
