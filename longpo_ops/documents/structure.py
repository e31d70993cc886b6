"""Where a text may be parted, and how good each place is.

    characters --a table of kinds, then runs of whitespace--> letter, word, sentence, line, paragraph
    lines      --what headings look like--> headings, the higher their level the better
    blocks of code, tables, figures --> their beginning; inside them lines and words alone

Headings are those of Markdown, LaTeX, reStructuredText (underlined), manual pages (capitals above an indented line), and
of plain text: "Chapter 3", "3.2 Title", and the like in a few more languages. A line of a table of contents is none.

Scripts without spaces: Chinese and Japanese may be parted between any two characters, Thai, Lao, Burmese and Khmer, where
neither a space nor a zero-width space is in reach, between two letters, but never in front of a sign that belongs to the
letter before. That is the lowest rank; it may lie inside a word, as words are only told by a dictionary.

Memory: 12 bytes per character while a text is looked through.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np

LETTER, WORD, SENTENCE, LINE, PARAGRAPH, BLOCK, HEADING = 1, 2, 3, 4, 5, 6, 7
SEAM, END = 20, 30  # between two documents that were joined; the end of a text
LEVELS = 6  # a heading of level 1 has the rank HEADING + 5, one of level 6 HEADING

OTHER, SPACE, WIDE, BASE, SIGN, LEAD = range(6)  # a stacker is OTHER: it holds both its neighbours
SPACES = (
    9,
    10,
    11,
    12,
    13,
    28,
    29,
    30,
    31,
    32,
    0x85,
    0xA0,
    0x1680,
    *range(0x2000, 0x200C),
    0x2028,
    0x2029,
    0x202F,
    0x205F,
)
STOPS = ".!?\u2026\u3002\uff01\uff1f\uff0e\u0964\u0965\u06d4\u061f\u0589\u1362\u17d4\u17d5\u104b\u0f0d\u0f0e"
BARE = "\u3002\uff01\uff1f"  # ends a sentence where no space follows
CLOSERS = "\"'\u2019\u201d)]\u300d\u300f\u300b\uff09"


def _kinds() -> np.ndarray:
    """(65536,) uint8: the kind of each character; those beyond are letters like any other."""
    kinds = np.zeros(65536, np.uint8)
    for first, end in ((0x2E80, 0xA000), (0xF900, 0xFB00), (0xFF00, 0xFF66)):  # Chinese, Japanese
        kinds[first:end] = WIDE
    for first, end in ((0x0E00, 0x0F00), (0x1000, 0x10A0), (0x1780, 0x1800)):  # Thai and Lao, Burmese, Khmer
        for code in range(first, end):
            letter = unicodedata.category(chr(code))
            kinds[code] = SIGN if letter.startswith("M") else BASE if letter.startswith("L") else OTHER
    kinds[[0x0E30, 0x0E32, 0x0E33, 0x0E45, 0x0E46, 0x0EB0, 0x0EB2, 0x0EB3]] = SIGN  # vowels behind their consonant
    kinds[[*range(0x0E40, 0x0E45), *range(0x0EC0, 0x0EC5)]] = LEAD  # vowels before theirs
    kinds[[0x1039, 0x17D2]] = OTHER
    kinds[[*SPACES, 0x3000]] = SPACE
    return kinds


KINDS = _kinds()
BLOCKS = 1 << 20  # characters whose kinds are looked up at a time

PARTS = "Part|PART|Book|BOOK|Teil|Partie|Parte|Часть"
CHAPTERS = "Chapter|CHAPTER|Appendix|APPENDIX|Kapitel|Anhang|Chapitre|Annexe|Capítulo|Capitolo|Глава"
HAN = "[ ]?(?:[0-9]{1,4}|[一二三四五六七八九十百零〇]{1,7})[ ]?"
HEADINGS = re.compile(
    rf"""^(?:[ \t]{{0,3}}(?P<hashes>\#{{1,6}})[ \t]
    |[ \t]*\\(?P<latex>part|chapter|(?:sub){{0,2}}section)\*?[\[{{]
    |[ \t]*(?:{PARTS})[ ](?:\d{{1,3}}|[IVXL]{{1,6}})\b(?P<part>[^\n]{{0,80}})$
    |[ \t]*(?:{CHAPTERS})[ ](?:\d{{1,3}}|[IVXL]{{1,6}}|[A-Z])\b(?P<chapter>[^\n]{{0,80}})$
    |[ \t\u3000]*第{HAN}(?:(?P<volume>[部篇編编卷])|(?P<han>[章回])|[节節])(?P<after>[^\n\u3002\uff0c]{{0,40}})$
    |[ \t]*(?P<number>\d{{1,2}}(?:\.\d{{1,3}}){{1,4}})\.?[ \t]+(?P<title>[^\W\d_][^\n]{{2,80}})$
    |(?P<capitals>[^\W\d_a-z][^\na-z]{{2,60}})$(?=\n\n?[ \t]+\S))""",
    re.MULTILINE | re.VERBOSE,
)
UNDERLINED = re.compile(
    r"^[ \t]*(?P<over>\S[^\n]*)\n(?P<line>={3,}|-{3,}|\*{3,}|\^{3,}|\"{3,}|\+{3,}|\.{3,})[ \t]*$", re.MULTILINE
)
UNDER = {"=": 1, "-": 2, "*": 2}
OTHER_LINES = 4  # the level of a heading that is underlined otherwise
NO_TITLE = re.compile(r"[.,;:]\s*$|\.\s?\.\s?\.|\s\d+\s*$")  # the end of a sentence, or a line of a table of contents
CODE = re.compile(
    r"^[ \t]*(?P<fence>```+|~~~+)[^\n]*\n.*?(?:^[ \t]*(?P=fence)[ \t]*$|\Z)"
    r"|^[ \t]*\\begin\{(?P<env>verbatim|lstlisting|minted|equation|align|table|figure)\*?\}"
    r".{0,20000}?\\end\{(?P=env)\*?\}",
    re.MULTILINE | re.DOTALL,
)


def find_breaks(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Places (n,) int64 where a text may be parted, in order, and their ranks (n,) int8; the last is its end."""
    ranks = _between_characters(text)
    for place, level in headings(text):
        ranks[place] = HEADING + LEVELS - level
    for block in CODE.finditer(text):
        inside = ranks[block.start() + 1 : block.end()]
        inside[inside == SENTENCE] = WORD
        inside[inside > LINE] = LINE
        ranks[block.start()] = max(BLOCK, ranks[block.start()])
    ranks[-1] = END
    places = np.flatnonzero(ranks)
    return places, ranks[places]


def _between_characters(text: str) -> np.ndarray:
    """(n + 1,) int8: the rank of the place in front of each character, by what stands on both sides."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    ranks = np.zeros(len(codes) + 1, np.int8)
    if not len(codes):
        return ranks
    kinds = np.concatenate([KINDS[np.minimum(codes[i : i + BLOCKS], 0xFFFF)] for i in range(0, len(codes), BLOCKS)])
    before, after, inner = kinds[:-1], kinds[1:], ranks[1:-1]
    inner[((before == BASE) | (before == SIGN)) & ((after == BASE) | (after == LEAD))] = LETTER
    inner[(before == WIDE) & (after == WIDE)] = WORD
    bare = np.sort(np.concatenate([np.flatnonzero(codes == ord(stop)) for stop in BARE])) + 1
    bare = _behind_closers(codes, bare[bare < len(codes)])
    ranks[bare[bare < len(codes)]] = SENTENCE
    space = kinds == SPACE
    place = np.flatnonzero(space[:-1] & ~space[1:]) + 1  # the first character behind each run of whitespace
    run = np.flatnonzero(~space[:-1] & space[1:]) + 1  # the first one of each run
    run = np.concatenate([[0], run]) if space[0] else run
    run = run[: len(place)]
    lines, pages = (_within(np.flatnonzero(codes == code), run, place) for code in (10, 12))
    ranks[place] = np.select(
        [(lines > 1) | (pages > 0), lines == 1, _ends_sentence(codes, run - 1)], [PARAGRAPH, LINE, SENTENCE], WORD
    )
    return ranks


def _within(places: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """How many of the places, in order, lie in each stretch [begin, end)."""
    return np.searchsorted(places, ends) - np.searchsorted(places, begins)


def _behind_closers(codes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The places moved behind a closing quote or bracket or two."""
    closers = [ord(closer) for closer in CLOSERS]
    for _ in range(2):
        places = places + np.isin(codes[np.minimum(places, len(codes) - 1)], closers)
    return np.minimum(places, len(codes))


def _ends_sentence(codes: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Whether the character at each place, or the one before a closing quote or bracket or two, ends a sentence."""
    closers = [ord(closer) for closer in CLOSERS]
    last = np.maximum(last, 0)
    for _ in range(2):
        last = np.maximum(last - np.isin(codes[last], closers), 0)
    return np.isin(codes[last], [ord(stop) for stop in STOPS])


def headings(text: str) -> list[tuple[int, int]]:
    """(place, level) of the lines that look like headings, 1 the highest level."""
    found = [(match.start(), level) for match in HEADINGS.finditer(text) if (level := _level(text, match))]
    for match in UNDERLINED.finditer(text):
        line, over = match["line"], match["over"].rstrip()
        fits = line[0] in "=-" or 0.7 * len(over) <= len(line) <= len(over) + 12
        if fits and any(map(str.isalnum, over[:200])):
            found.append((match.start(), UNDER.get(line[0], OTHER_LINES)))
    return found


def _level(text: str, match: re.Match) -> int | None:
    kind = match.lastgroup
    if kind == "hashes":
        return len(match["hashes"])
    if kind == "latex":
        return {"part": 1, "chapter": 2}.get(match["latex"], 3 + match["latex"].count("sub"))
    if kind == "after":
        return 1 if match["volume"] else 2 if match["han"] else 3
    if kind == "capitals":
        begin = match.start()
        return 3 if (begin == 0 or text[max(0, begin - 2) : begin] == "\n\n") and match["capitals"].isupper() else None
    title = match[kind].lstrip(" \t.:-\u2013\u2014")
    if NO_TITLE.search(match[kind]) or (title[:1].islower() and kind != "title"):
        return None
    return {"part": 1, "chapter": 2}.get(kind) or min(LEVELS, 2 + match["number"].count("."))


def heading_at(text: str, place: int) -> str:
    """The words of the heading whose line begins at a place, at most 120 characters."""
    line = text[place : place + 1000].lstrip().partition("\n")[0]
    line = re.sub(r"^(?:#{1,6}[ \t]+|\\\w+\*?(?:\[[^\]]*\])?\{?)|[ \t]*#*[ \t]*$", "", line)
    return line.rstrip("}\u00b6 \t")[:120]
