"""Which form a processor's products take: measured once, kept, or forced."""

import json
import os

import pytest
import torch

from longpo_ops import explain_backend
from longpo_ops.ops import fastest
from longpo_ops.ops.dispatch import choose_backend
from longpo_ops.ops.products import Products


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A cache without an answer."""
    if choose_backend(torch.device("cpu"), torch.float32).name != "cpu":
        pytest.skip("the C++ back-end is not here")
    monkeypatch.setenv("LONGPO_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(fastest.VARIABLE, raising=False)
    fastest._remembered.cache_clear()
    yield
    fastest._remembered.cache_clear()


def asked():
    return fastest.products_by_blocks(torch.float32)


def test_the_answer_is_kept_for_a_number_of_threads():
    found, file = asked(), fastest.file(torch.get_num_threads())
    assert json.loads(file.read_text()) == {"threads": torch.get_num_threads(), "by_blocks": list(found)}
    assert fastest.file(torch.get_num_threads() + 1) != file
    other = [name for name in fastest.PRODUCTS if name not in found]
    file.write_text(json.dumps({"by_blocks": other}))
    assert asked() == found  # this process does not change its mind
    fastest._remembered.cache_clear()
    assert asked() == tuple(other)


def test_another_library_is_asked_anew(monkeypatch):
    before = fastest.file(1)
    monkeypatch.setattr(fastest, "cpu_library_name", lambda: "cpu-torch-other.so")
    assert fastest.file(1) != before


def test_the_faster_form_of_each_is_taken(monkeypatch):
    slow = lambda: torch.mm(big, big)  # noqa: E731
    quick, big = (lambda: None), torch.randn(300, 300)
    forms = {fastest.LOGITS: (slow, quick), fastest.HIDDEN: (quick, slow), fastest.HEAD: (slow, quick)}
    monkeypatch.setattr(fastest, "_forms", lambda: forms)
    assert asked() == (fastest.HIDDEN,)


@pytest.mark.parametrize("damage", ["no folder", "no JSON"])
def test_a_cache_that_does_not_serve(monkeypatch, tmp_path, damage):
    if damage == "no folder":
        (tmp_path / "file").touch()
        monkeypatch.setenv("LONGPO_OPS_CACHE", str(tmp_path / "file" / "cache"))
    else:
        file = fastest.file(torch.get_num_threads())
        file.parent.mkdir(parents=True)
        file.write_text("{")
    assert set(asked()) <= set(fastest.PRODUCTS)


def test_forced(monkeypatch):
    for name, expected in (("blocks", fastest.PRODUCTS), ("torch", ())):
        monkeypatch.setenv(fastest.VARIABLE, name)
        assert asked() == expected
        assert not os.path.exists(os.environ["LONGPO_OPS_CACHE"])  # nothing was measured
    monkeypatch.setenv(fastest.VARIABLE, "mkl")
    with pytest.raises(ValueError, match=r"LONGPO_OPS_PRODUCTS='mkl'.*blocks, torch"):
        asked()
    assert fastest.products_by_blocks(torch.bfloat16) == fastest.PRODUCTS


def test_it_is_told(monkeypatch):
    monkeypatch.setenv(fastest.VARIABLE, "torch")
    assert "runs, float32 with torch's products (logits, hidden, head) (LONGPO_OPS_PRODUCTS)" in explain_backend("cpu")
    monkeypatch.setattr(fastest, "products_by_blocks", lambda dtype: (fastest.HEAD,))
    assert "its own products (head) and torch's products (logits, hidden)" in fastest.explain_products()


def test_both_forms_are_the_products(monkeypatch):
    h, w, dz = torch.randn(70, 40), torch.randn(300, 40), torch.randn(70, 300)
    results = []
    for name in ("blocks", "torch"):
        monkeypatch.setenv(fastest.VARIABLE, name)
        products = Products(w, torch.float32, "cpu")
        z, dw = torch.empty(70, 300), torch.zeros(300, 40)
        products.add_weight_gradient_(dw, dz, h)
        results.append((products.logits_(h, z), products.hidden_gradient(dz), dw))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_few_rows_are_multiplied_by_blocks(monkeypatch):
    """torch's products of few rows may add V numbers one after another."""
    monkeypatch.setenv(fastest.VARIABLE, "torch")
    products, called = Products(torch.randn(50, 8), torch.float32, "cpu"), []
    ops = torch.ops.longpo_cpu
    monkeypatch.setattr(ops, "hidden_gradient_", lambda *given: called.append(given), raising=False)
    products.hidden_gradient(torch.randn(5, 50))
    products.hidden_gradient(torch.randn(50, 50))
    assert len(called) == 1
