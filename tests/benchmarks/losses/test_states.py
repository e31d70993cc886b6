"""benchmarks/losses/states.py: its texts, what it keeps, and what it says without the model."""

import pytest
import torch

from benchmarks.losses import states


def test_texts_are_long_enough_and_of_their_kind():
    prose, code = states.text("prose"), states.text("code")
    assert min(map(len, (prose, code))) == 200_000
    assert code.count("\n    def ") > 20 > prose.count("\n    def ")


def test_what_was_read_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "FOLDER", tmp_path / "states")
    made = []

    def read(kind):
        made.append(kind)
        return torch.randn(states.TEXTS * states.TOKENS, 6), torch.zeros(
            states.TEXTS * states.TOKENS, dtype=torch.int64
        )

    monkeypatch.setattr(states, "_read", read)
    torch.save(torch.randn(50, 6), _folder(tmp_path) / "head.pt")
    first, second = states.load("code"), states.load("code")
    assert made == ["code"] and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    hidden, weight, labels = states.load("flat")
    assert made == ["code"] and hidden.shape == first[0].shape and labels.max() < len(weight)
    assert (hidden @ weight.t()).softmax(-1).amax(1).mean() < 0.2


def _folder(tmp_path):
    folder = tmp_path / "states"
    folder.mkdir()
    return folder


def test_without_the_model_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "FOLDER", tmp_path / "states")
    monkeypatch.setattr(states.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"requirements/real\.txt"):
        states.load("prose")
