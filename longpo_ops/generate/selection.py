"""Which documents a run takes: files to texts, texts to documents in bounds, documents to tasks with their chunks.

    text of T tokens   first < T <= last                a document
                       T > last    --Cutter-->          documents, as many as it gives; what is left of it a rest
                       T <= first  --join: "short"-->   with others of its folder, in the order of the listing, likewise
    `official`: texts out of bounds are left out

A document knows its place (Document.place): the part's number, its characters in the text, the heading it begins under; a
joined one the sources and characters of its pieces. Its id is the digest of its own text, so equal parts are duplicates
like equal texts, and what is drawn for it depends on neither order nor stops.

What is lost for want of length is counted in bytes of UTF-8: a text of fewer bytes than it needs tokens is not tokenised.
Memory: one text, and the short texts of one folder up to 64 bytes per token of the longest document.

Tests: tests/generate/test_selection.py.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from ..documents.cutting import Cutter, Part, Piece, Rest, joined, pieces_of
from ..documents.listing import BYTES_PER_TOKEN, LARGEST, Document, Listing, read_documents, size_of
from ..documents.unreadable import TOO_LONG
from .makers import Parted, Parting
from .steps import Task

TOO_SHORT = "shorter than wanted"
REST = "rest of a cut document"
NAMED = 3  # sources in a joined document's own; all are in its place


def select(run, files: list[tuple[Path, str]], tokenizer, listing: Listing, done=lambda document: False) -> Iterator:
    """Stream the tasks of a run (GenerateRun) in the order of its documents; for a document that is done only its position."""
    for document, found in _Selection(run, tokenizer, listing, done).documents(files):
        if listing.selected == run.max_documents:
            return
        if isinstance(found, Parted) and not found.chunks:
            listing.skip("shorter than one chunk", document.source)
            continue
        listing.selected += 1
        position = max(document.position, listing.selected / (run.max_documents or float("inf")))
        if found is None:
            yield position
            continue
        chunks = found.chunks
        if not run.maker.asks_all:
            draw = random.Random(f"{run.seed}|{document.id}|chunks")
            chunks = [chunks[i] for i in sorted(draw.sample(range(len(chunks)), min(run.chunks, len(chunks))))]
        laid_out = dataclasses.replace(document, text=found.text)
        yield Task(listing.selected, position, laid_out, found.tokens, tuple(chunks))


Found = Iterator[tuple[Document, Parted | None]]  # None: it is done


class _Selection:
    def __init__(self, run, tokenizer, listing: Listing, done: Callable[[str], bool]):
        self.run, self.listing, self.done = run, listing, done
        self.first, self.last = run.document_bounds()
        self.part: Parting = run.maker.parting(tokenizer, *run.chunk_bounds())
        self.cutter = Cutter(tokenizer, self.first, self.last) if run.maker.cuts else None
        self.pending: list[Piece] = []
        self.folder, self.waiting = "", 0  # of the pending ones: where they lie, and their bytes

    def documents(self, files: list[tuple[Path, str]]) -> Found:
        """Every document in bounds, as the recipe lays it out."""
        if self.run.join:
            files = sorted(files, key=lambda named: named[0].parent)
        longest = max(self.last, LARGEST // BYTES_PER_TOKEN) if self.cutter else self.last
        position = 0.0
        for document in read_documents(files, self.listing, self.run.column, longest):
            if document.folder != self.folder or self.waiting > BYTES_PER_TOKEN * self.last:
                yield from self.join(position)
            self.folder, position = document.folder, document.position
            yield from self.fit(document)
        yield from self.join(1.0)

    def fit(self, document: Document) -> Found:
        """The documents that come of one text."""
        if self.done(document.id):
            yield document, None
            return
        text = document.text
        if document.size <= self.first:  # a token takes a byte at least
            self.short(Piece(text, document.source), TOO_SHORT)
            return
        starts = self.part.starts(text)
        if len(starts) <= self.first:
            self.short(Piece(text, document.source), TOO_SHORT)
        elif len(starts) <= self.last:
            yield document, self.part(document, starts)
        elif self.cutter is None:
            self.listing.lose(TOO_LONG, document.source, document.size)
        else:
            parts = [*self.cutter.cut(text, starts)]
            number, count = 0, sum(isinstance(part, Part) for part in parts)
            self.listing.cut += 1
            for part in parts:
                if isinstance(part, Rest):
                    self.short(Piece(text[part.begin : part.end], document.source, part.begin), REST)
                    continue
                number += 1
                self.listing.parts += 1
                place = {"part": [number, count], "characters": [part.begin, part.end]}
                place |= {"heading": part.heading} if part.heading else {}
                source = f"{document.source}#{number}/{count}"
                yield from self.laid_out(text, part, source, document.position, {"part": place})

    def laid_out(self, text: str, part: Part, source: str, position: float, place: dict) -> Found:
        """A part as a document of its own, if it is the first of this text."""
        document = self.listing.take(text[part.begin : part.end], source, position, self.folder, place)
        if document is not None:
            parted = None if self.done(document.id) else self.part(document, part.starts, part.breaks, part.tokens)
            yield document, parted

    def short(self, piece: Piece, reason: str) -> None:
        """Keep a text for joining, or count it as lost."""
        if not self.run.join:
            self.listing.lose(reason, piece.source, size_of(piece.text))
            return
        text = piece.text.strip()
        begin = piece.begin + piece.text.index(text)
        self.pending.append(Piece(text, piece.source, begin))
        self.waiting += size_of(text)

    def join(self, position: float) -> Found:
        """The documents that come of the texts that wait."""
        pieces, self.pending, self.waiting = self.pending, [], 0
        if not pieces:
            return
        text, places = joined(pieces)
        lost, used = [0] * len(pieces), set()
        for part in self.cutter.cut(text, self.part.starts(text), places[1:]):
            members = pieces_of(part, pieces, places)
            if isinstance(part, Rest):
                for number, begin, end in members:
                    lost[number] += size_of(pieces[number].text[begin:end])
                continue
            used |= {number for number, *_ in members}
            self.listing.joins += 1
            place = [
                {
                    "source": pieces[number].source,
                    "characters": [pieces[number].begin + begin, pieces[number].begin + end],
                }
                for number, begin, end in members
            ]
            yield from self.laid_out(text, part, _sources(place), position, {"joined": place})
        self.listing.joined += len(used)
        for number, size in enumerate(lost):
            if size:
                self.listing.lose(REST if number in used else TOO_SHORT, pieces[number].source, size)


def _sources(place: list[dict]) -> str:
    names = [piece["source"] for piece in place]
    return " + ".join(names if len(names) <= NAMED else [names[0], f"{len(names) - 2} more", names[-1]])
