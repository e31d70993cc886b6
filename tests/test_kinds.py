"""Kinds of arguments: what is of a kind comes back as a plain value, what is not is named."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from longpo_ops.kinds import (
    check_choice,
    check_each,
    check_flag,
    check_number,
    check_object,
    check_tensor,
    check_whole,
    shown,
)

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "value", [0.5, 2, np.float32(0.5), np.float64(3), np.int64(4), Fraction(1, 2), 2**70], ids=repr
)
def test_numbers_come_back_as_floats(value):
    number = check_number("x", value)
    assert type(number) is float and number == value


@pytest.mark.parametrize(
    "value",
    [None, "1", True, math.nan, math.inf, -math.inf, 1j, [1.0], 10**400, np.ones(1), np.bool_(True), np.float32("nan")],
    ids=lambda value: f"{type(value).__name__} {str(value)[:9]}",
)
def test_what_is_no_finite_number_is_named(value):
    with pytest.raises(ValueError, match=r"^x=.*: expected a finite number$"):
        check_number("x", value)
    with pytest.raises(ValueError, match=r"^x=.*: expected a finite number > 0$"):
        check_number("x", value, above=0)


def test_a_number_that_is_not_above_its_bound_is_named():
    assert check_number("x", 1e-300, above=0) == 1e-300
    for value in (0, 0.0, -1, np.float32(-2)):
        with pytest.raises(ValueError, match=r"^x=.*: expected a finite number > 0"):
            check_number("x", value, above=0)


def test_a_tensor_is_no_number_and_how_to_make_one_is_told():
    with pytest.raises(ValueError, match=r"^x=tensor\(2\): expected a finite number; of a tensor give .item\(\)$"):
        check_number("x", torch.tensor(2))
    with pytest.raises(ValueError, match=r"^x=a torch.float32 tensor \(3, 3\) on cpu: expected a finite number;"):
        check_number("x", torch.ones(3, 3))


def test_whole_numbers_that_int64_holds():
    for value in (-(2**63), 2**63 - 1, np.int32(7), np.uint8(3)):
        assert type(check_whole("x", value)) is int and check_whole("x", value) == value
    for value in (2**63, -(2**63) - 1, 1.0, np.float64(1), True, "1", None, torch.tensor(1)):
        with pytest.raises(ValueError, match=r"^x=.*: expected an int that int64 holds"):
            check_whole("x", value)
    with pytest.raises(ValueError, match=r"^x=-1: expected an int >= 0$"):
        check_whole("x", -1, 0)
    with pytest.raises(ValueError, match=r"^x=0: expected some bytes$"):
        check_whole("x", 0, 1, "some bytes")


def test_flags_are_no_numbers():
    assert check_flag("x", np.bool_(False)) is False and check_flag("x", True) is True
    for value in (0, 1, None, "yes", torch.tensor(True)):
        with pytest.raises(ValueError, match=r"^x=.*: expected True or False"):
            check_flag("x", value)


def test_choices_even_where_comparing_makes_no_bool():
    assert check_choice("x", "a", ("a", "b")) == "a"
    for value in ("c", "", None, 5, np.ones(3), torch.ones(3), ["a"], object):
        with pytest.raises(ValueError, match=r"^x=.*: expected one of a, b"):
            check_choice("x", value, ("a", "b"))


def test_objects_and_several_of_them():
    assert check_object("x", "text", str | None, "text or None") == "text"
    with pytest.raises(ValueError, match=r"^x: expected text, got int$"):
        check_object("x", 3, str, "text")
    with pytest.raises(ValueError, match=r"^x: expected a dict, got the class dict$"):
        check_object("x", dict, dict, "a dict")
    assert list(check_each("x", iter("ab"), str, "text")) == ["a", "b"]
    with pytest.raises(ValueError, match=r"^x\[1\]: expected text, got int$"):
        list(check_each("x", ["a", 1], str, "text"))
    for values in ("ab", 5, None, torch.ones(2)):
        with pytest.raises(ValueError, match=r"^x: expected several, each text, got"):
            list(check_each("x", values, str, "text"))
    with pytest.raises(ValueError, match=r"^x: expected several, each text, got set$"):
        list(check_each("x", {"a"}, str, "text", (tuple, list)))


ODD = {
    "list": (lambda t: t.tolist(), "x: expected a tensor of float16, bfloat16, float32 or float64, got list"),
    "numpy": (lambda t: t.numpy(), "got ndarray"),
    "class": (lambda t: torch.Tensor, "got the class Tensor"),
    "int64": (lambda t: t.long(), "x.dtype=torch.int64: expected float16, bfloat16, float32 or float64"),
    "complex64": (lambda t: t.to(torch.complex64), "x.dtype=torch.complex64"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "x.dtype=torch.float8_e4m3fn"),
    "quantised": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "x.dtype=torch.qint8"),
    "coo": (lambda t: t.to_sparse(), "layout sparse_coo came: expected a dense one; give .to_dense()"),
    "csr": (lambda t: t.to_sparse_csr(), "layout sparse_csr"),
    "mkldnn": (lambda t: t.to_mkldnn(), "layout _mkldnn"),
    "nested": (lambda t: torch.nested.nested_tensor([t, t]), "a nested tensor came"),
    "meta": (lambda t: t.to("meta"), "x is on the meta device"),
    "shape": (lambda t: t[0], r"x.shape=\(4,\): expected \(3, 4\), one each"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make, message", ODD.values(), ids=ODD)
def test_what_is_no_dense_tensor_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        check_tensor("x", make(torch.ones(3, 4)), shape=(3, 4), note=", one each")


def test_a_subclass_made_of_other_tensors_is_no_dense_tensor():
    class Codes(torch.Tensor):
        def __tensor_flatten__(self):
            return ["codes"], None

    with pytest.raises(ValueError, match=r"^x: a Codes came: expected a plain tensor; dequantise or convert it first$"):
        check_tensor("x", torch.ones(2).as_subclass(Codes))


def test_dense_tensors_pass_whatever_their_strides_and_class():
    base = torch.ones(4, 3)
    for tensor in (base.t(), torch.nn.Parameter(torch.ones(3, 4)), base[:, :1].expand(4, 3).t()):
        assert check_tensor("x", tensor, shape=(3, 4)) is tensor


def test_values_are_shown_without_reading_a_device_or_filling_a_screen():
    assert shown(torch.ones(2, device="meta")) == "a torch.float32 tensor (2,) on meta"
    assert shown(torch.ones(9)) == "a torch.float32 tensor (9,) on cpu"
    assert shown(10**5000) == "an int of 16610 bits"  # whose decimal digits Python refuses to write
    assert len(shown("x" * 1000)) < 120 and shown([1, 2]) == "[1, 2]"
