"""One error for whatever a model's files make the libraries raise that read them.

    loading   transformers, tokenizers, safetensors, huggingface_hub, jinja2, json, torch raise  -> BrokenModel, from theirs
    trying    a model that was read runs, and refuses what its config says                        -> BrokenModel
              any other error is the machine's or the program's                                   -> itself

A folder may hold anything in any place, and the libraries answer with whatever exception they come to. The message names the
model, the file, the field where it can be known, and what came. What is no fault of the files keeps its own words: no memory, a
full or read-only disk, too many open files, a library that is not installed, Ctrl-C.

Not covered: files whose reading never ends in the libraries' own code, and those that crash it.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
NUMBERED = re.compile(r"\(os error (\d+)\)")  # what libraries written in Rust make of the system's errors
SMALL = (  # files of a model that hold one JSON object each
    *("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
)
LARGE = ("tokenizer.json", "model.safetensors.index.json", "adapter_config.json")
TEXTS = ("chat_template.jinja",)


class BrokenModel(ValueError):
    """A model that cannot be used as its files are."""


@contextmanager
def loading(name: str, what: str | Callable[[], str] = "") -> Iterator[None]:
    """Within it libraries read files of the model `name`. what: which of them, or what of the model, for the message; a
    function is asked once something failed.

    Raises BrokenModel, a ValueError, for whatever they raise; what is no fault of the files goes through.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, BrokenModel) or not _is_of_the_files(error):
            raise
        why = _unreadable(Path(name), (*SMALL, *LARGE, *TEXTS)) or ": ".join(
            filter(None, (what() if callable(what) else what, explain(error)))
        )
        if not Path(name).exists():
            why += " (no folder of that name is here, either)"
        elif not isinstance(error, OSError | ValueError):  # those say themselves what to do
            why += "; mend the file, or fetch the model again"
        raise BrokenModel(f"model {name!r} cannot be loaded: {why}") from error


@contextmanager
def trying(name: str, what: str) -> Iterator[None]:
    """Within it the model `name`, which was read whole, runs. Raises BrokenModel, a ValueError, for a ValueError, and for what
    transformers' generation makes of settings that it cannot use; everything else goes through."""
    try:
        yield
    except Exception as error:
        refused = isinstance(error, ValueError) or _is_of_generation(error)
        if isinstance(error, BrokenModel) or not refused or not _is_of_the_files(error):
            raise
        raise BrokenModel(f"model {name!r}: {what}: {explain(error)}") from error


@contextmanager
def quiet(bar: bool = True) -> Iterator[None]:
    """Without what transformers logs, which is told here in other words, and without its bar."""
    from transformers.utils import logging as theirs

    level, shown = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    if not bar:
        theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if shown:
            theirs.enable_progress_bar()


def explain(error: BaseException) -> str:
    """What an exception says, in one line; of what kind it is where the words alone say little."""
    from safetensors import SafetensorError

    words, kind = " ".join(str(error).split()), type(error)
    if isinstance(error, SafetensorError):
        return f"its safetensors cannot be read ({words})"
    return (
        words
        if words
        and (isinstance(error, OSError | ValueError) or kind is Exception or kind.__module__.startswith("jinja2"))
        else f"{kind.__name__}: {words}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is torch.OutOfMemoryError, MemoryError, or what torch says on CPU."""
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    return named or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _is_of_the_machine(error: BaseException | None) -> bool:
    """Whether the system said it, in a number or in words, or caused it."""
    if error is None:
        return False
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := NUMBERED.search(str(error))):
        number = int(found[1])
    return number in OF_THE_MACHINE or _is_of_the_machine(error.__cause__)


def _is_of_generation(error: Exception) -> bool:
    """Whether transformers' code around a model raised it, which works with generation_config.json, and no kernel."""
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    ours = last.tb_frame.f_globals.get("__name__", "").startswith("transformers.generation.")
    return ours and not isinstance(error, torch.AcceleratorError)


def _is_of_the_files(error: BaseException) -> bool:
    if isinstance(error, ImportError) or is_out_of_memory(error) or _is_of_the_machine(error):
        return False
    return (
        isinstance(error, Exception) or type(error).__name__ == "PanicException"
    )  # of tokenizers, which is written in Rust


def check_files(name: str) -> None:
    """Raises BrokenModel for a small file of a folder that is no JSON object: transformers goes on without some of them."""
    if why := _unreadable(Path(name), SMALL):
        raise BrokenModel(f"model {name!r} cannot be loaded: {why}; fetch the model again")


def _unreadable(folder: Path, names: tuple[str, ...]) -> str | None:
    """The first of the files of a folder that is no text, no JSON, or no JSON object, and what it is."""
    for name in names if folder.is_dir() else ():
        file = folder / name
        if not file.exists() and not file.is_symlink():
            continue
        try:
            text = file.read_text("utf-8")
            told = json.loads(text) if name not in TEXTS else {}
        except UnicodeDecodeError as error:
            return f"{name} is no UTF-8 ({error.reason} at byte {error.start} of {file.stat().st_size})"
        except RecursionError:
            return f"{name} is nested too deep"
        except ValueError as error:
            return f"{name} is no JSON: {error} (of {len(text):,} characters, which begin {text[:20]!r})"
        except OSError as error:
            if _is_of_the_machine(error):
                raise
            return f"{name} cannot be read: {error.strerror}"
        if not isinstance(told, dict):
            return f"{name} holds a JSON {type(told).__name__}, {json.dumps(told)[:40]}; expected an object"
    return None
