"""What the reader of PDF makes of real documents, beside `pdftotext`: words and runs of five words.

    python -m benchmarks.loop.reading FILE.pdf ... [--misses 20]

Both texts are made comparable: ligatures are written out, control characters and hyphens go (pdftotext joins every word that
is parted at the end of a line, the reader leaves a hyphen that belongs to the word), words are runs of letters and digits.
Heads, feet and page numbers, which pdftotext keeps, go from its pages where one of their first or last three lines says what
the reader took for such on that page; how many went is shown, so that a text taken for a head cannot hide. Where the reader
finds line numbers, words of digits alone go on both sides. A share is the smaller one of recall and precision, over all
words (or runs of five), each as often as it is there. pdftotext has two orders, its reading order and that of `-layout`, which
alone goes through tables row by row: runs are compared with the nearer one. Needs `pdftotext`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import time
import unicodedata
from collections import Counter
from pathlib import Path

from longpo_ops.documents.columns import glued
from longpo_ops.documents.layout import as_read, cleaned
from longpo_ops.documents.margins import without_heads, without_numbers
from longpo_ops.documents.pdf import pages

WORD = re.compile(r"[\u3040-\u9fff]|[^\W_\u3040-\u9fff]+")
UNSEEN = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ue000-\uf8ff]")
HYPHEN = re.compile(r"(?<=\w)[-\u00ad\u2010\u2011](?=\w)")
PARTED = re.compile(r"(?<=[^\W\d_])-\n+[ \t]*(?=[a-z])")
EDGE = 3  # lines of a page among which heads and feet are


def words(text: str) -> list[str]:
    """The words that both sides are reduced to; a Chinese character is one."""
    return WORD.findall(HYPHEN.sub("", unicodedata.normalize("NFKC", UNSEEN.sub("", text))))


def runs(found: list[str]) -> Counter:
    """How often each run of five words is there."""
    return Counter(zip(*(found[i:] for i in range(5))))


def share(ours: Counter, theirs: Counter) -> float:
    """The smaller one of recall and precision."""
    return (ours & theirs).total() / max(1, ours.total(), theirs.total())


def margins(read: list) -> tuple[list[str], int, bool]:
    """The letters of what the reader takes for heads and feet, by page, how many lines those are, and whether it finds line
    numbers."""
    cleaned_pages = [cleaned(page) for page in read]
    unnumbered = without_numbers(cleaned_pages)
    before = [page._replace(lines=glued(page.lines)) for page in unnumbered]
    gone = [[line for line in a.lines if line not in b.lines] for a, b in zip(before, without_heads(before))]
    letters = ["".join(words(" ".join(line.text for line in sorted(page, key=lambda line: line.x0)))) for page in gone]
    return letters, sum(map(len, gone)), unnumbered is not cleaned_pages


def oracle(file: Path, gone: list[str], *options: str) -> str:
    """pdftotext's text without heads and feet."""
    command = ["pdftotext", "-enc", "UTF-8", *options, str(file), "-"]
    text = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    kept = []
    for page, letters in zip(text.split("\f"), gone):
        lines = page.splitlines()
        filled = [i for i, line in enumerate(lines) if line.strip()]
        edge = {i for i in filled[:EDGE] + filled[-EDGE:] if "".join(words(lines[i])) in letters}
        kept += [line for i, line in enumerate(lines) if i not in edge]
    return PARTED.sub("", "\n".join(kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--misses", type=int, default=0, help="show the most frequent words that one side lacks")
    arguments = parser.parse_args()
    print("words  5-grams  pages  heads     us/character  file")
    for file in arguments.files:
        begin = time.process_time()
        read = list(pages(file))
        text = as_read(read)
        seconds = time.process_time() - begin
        gone, count, numbered = margins(read)
        sides = words(text), words(oracle(file, gone)), words(oracle(file, gone, "-layout"))
        if numbered:
            sides = ([word for word in side if not word.isdigit()] for side in sides)
        ours, theirs, placed = sides
        fives = max(share(runs(ours), runs(side)) for side in (theirs, placed))
        cost = 1e6 * seconds / max(1, len(text))
        print(
            f"{share(Counter(ours), Counter(theirs)):.4f} {fives:.4f} {len(read):6d} {count:6d} {cost:12.1f}     {file.name}"
        )
        if arguments.misses:
            print("  not ours:", (Counter(theirs) - Counter(ours)).most_common(arguments.misses))
            print("  ours alone:", (Counter(ours) - Counter(theirs)).most_common(arguments.misses))


if __name__ == "__main__":
    main()
