"""The questions in what a model wrote when it was asked for a list: a grammar of lines, and the published recipe's reading.

    text      lines; where it is JSON, its strings are the lines
    line      indent, mark, body. Mark: a number of any script with a sign behind it, with a word, brackets or stars
              around it or none ("1." "2)" "**3:**" "[4]" "Question 5:" "\u2465" "\u4e03\u3001"); a word and a
              colon ("Q:"); a bullet; a letter ("a)"); or none
    item      a marked line, and lines without a mark behind it as long as its sentence has not ended
    question  an item up to the first question mark that ends a sentence

Lines with one class of mark are a list; those that stand deeper than its first are lists below it. The first class in that
order that has at least two questions is the list that was asked for. So prefaces, remarks, headings, answers behind a
question and lists below it are none of its questions, and neither is a statement. Lines without a mark are a list where each
from the first question to the last is a whole question, with no empty line between, and there are as many as wanted: a remark
may be a question, too.

Of a list that was cut off the last line is left out, and what stands twice counts once. Left out, too: a question with a gap
to fill, and one whose answers to choose from stand behind it, as it is half a question without them.

Not covered: languages that write questions without a question mark (Japanese "\u304b\u3002" is read as one).

Tests: tests/generate/test_questions.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

LEAST = 2  # lines that make a list
CLASSES = ("number", "word", "bullet", "letter", "")
AROUND = r"[*_#>`~\[(\uff08\u3010\u300c\s]*"
DIGITS = r"\d{1,3}|[\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341]{1,3}"
ENCLOSED = r"[\u2460-\u249b\u2776-\u2793\u24ea-\u24ff]"  # one character that holds a number and its sign
WORD = r"[^\W\d_]{1,20}"
SIGN = r"[*_]*(?:[.:](?!\d)|[)\]\u3001\uff0e\u3002\uff1a\uff09\u3011\u300d\uff0c]|[-\u2013\u2014](?=\s)|$)[)\]:*_]*"
MARKS = {
    "number": re.compile(
        rf"{AROUND}(?:(?:{WORD})?\s*{AROUND}(?:{DIGITS})[\u554f\u95ee\u984c\u9898]?\s*{SIGN}|{ENCLOSED})"
    ),
    "bullet": re.compile(r"[-*+\u2022\u2023\u25aa\u25cf\u25e6\u2013\u2014\u00b7\u2043]\s+(?=\S)"),
    "letter": re.compile(r"[(\[*]*(?:[A-Za-z]|[ivxIVX]{1,4})[.)\]]+\**\s+(?=\S)"),
    "word": re.compile(rf"[*_]*({WORD})\s*[*_]*[:\uff1a][*_]*(?:\s|$)"),
}
BOLD = re.compile(r"(?<![^\s\"'(\u201c])\*\*(?=\S)(.+?)(?<=\S)\*\*(?![^\s\"'.,:;!?)\u201d\u3002\uff1f\uff1a])")
THEME = re.compile(r"\*\*[^*]+?(?::\*\*|\*\*:)\s*")  # "**Causes:** Why ...?"
ASKED = re.compile(r"(?:[?\uff1f\u061f\u037e\u2047\u203d]|\u304b\u3002)[?!\uff1f\uff01]*")
CLOSING = re.compile(r"[\"'\u201d\u2019\u00bb\u300d\u300f)\uff09\]*_`]*")
ENDED = re.compile(r"[.!:;?\uff1f\u061f\u037e\u2047\u203d\u3002\uff01\uff1a\u0964]" + CLOSING.pattern + r"\s*\Z")
GAP = re.compile(r"\.\.\.|\u2026|_{3}")
CHOICES = re.compile(r"\s*[(\[*]*[A-Ha-h][.)\]]")
QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "\u00ab": "\u00bb", "`": "`", "*": "*", "_": "_"}
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
FENCED = re.compile(r"```(?:json)?\s*([\[{].*?)(?:```|\Z)", re.DOTALL)
JSON = re.compile(r"\{|\[\s*[\"{]")

NUMBERED = re.compile(r"\b\d+\s*[:.!?-]+\s*")  # of the published recipe
EDGES = re.compile(r"\A[\s*#.!]+|[\s*#.!]+\Z")


@dataclass
class _Item:
    """A line and what goes on of it. kind: its class of mark. ended: whether nothing can be added to it."""

    kind: str
    indent: int
    text: str
    ended: bool
    apart: bool  # from the line before it, by an empty line
    choices: bool = False  # answers to choose from stand below it


def parse_questions(text: str, count: int, finish: str = "stop") -> list[str]:
    """The first `count` questions of a list, all different, as they are put to a model; [] where the text is no list.
    finish: of its Completion: where that is "length" the last line is not whole.
    """
    items = _items(text, finish == "length")
    lists = {kind: _questions([item for item in items if item.kind == kind]) for kind in CLASSES[:-1]}
    lists[""] = _unmarked([item for item in items if not item.kind], count)
    listed = next((found for found in lists.values() if len(found) >= LEAST), None)
    return (max(lists.values(), key=len) if listed is None else listed)[:count]


def question(text: str) -> str | None:
    """A body up to the question mark that ends its first question, without emphasis and quotes around it; None where no
    sentence of it asks anything.
    """
    text = BOLD.sub(r"\1", THEME.sub("", _bare(text.strip()), count=1)).strip()
    for mark in ASKED.finditer(text):
        end = CLOSING.match(text, mark.end()).end()
        behind = text[end:]
        wide = mark[0][0] in "\uff1f\u304b" and end == mark.end()
        if behind and not wide and (not behind[0].isspace() or behind.lstrip()[:1].islower()):
            continue  # inside a sentence, as in: Why does "Who goes there?" matter
        asked = _bare(text[:end] if _balanced(text[:end]) else text[: mark.end()])
        asked = asked.rstrip("*") if asked.count("**") % 2 else asked
        if GAP.search(asked) or CHOICES.match(behind) or not re.search(r"\w", asked):
            return None
        return " ".join(asked.split())
    return None


def _items(text: str, cut: bool) -> list[_Item]:
    lines, apart = list(_lines(text)), True
    items: list[_Item] = []
    for line in lines[:-1] if cut else lines:
        kind, body = _mark(line)
        indent, last = len(line) - len(line.lstrip()), items[-1] if items else None
        if not line.strip():
            if last is not None and last.text:
                last.ended = True
        elif kind or last is None or last.ended or not last.kind:
            if kind == "letter" and (above := next((each for each in reversed(items) if each.kind != kind), None)):
                above.choices = True
            items.append(_Item(kind, indent, body, bool(ENDED.search(body)), apart))
        else:
            last.text = f"{last.text} {body}".strip()
            last.ended = bool(ENDED.search(last.text))
        apart = not line.strip()
    return items


def _lines(text: str) -> Iterator[str]:
    """The lines of a text, or the strings of JSON, whole ones if it was cut off."""
    bare = fenced[1] if (fenced := FENCED.search(text)) else text.strip()
    if not JSON.match(bare):
        yield from text.expandtabs(4).splitlines()
        return
    for string in STRING.findall(bare):
        try:
            yield "- " + " ".join(_without_mark(json.loads(string)).split())
        except ValueError:  # a line break inside, say
            continue
    yield ""  # what a cut takes is not among the strings


def _without_mark(line: str) -> str:
    kind, body = _mark(line)
    return body if kind == "number" else line


def _mark(line: str) -> tuple[str, str]:
    """The class of a line's mark, and its body."""
    bare = line.strip()
    for kind, pattern in MARKS.items():
        if found := pattern.match(bare):
            body = bare[found.end() :]
            return kind, _mark(body)[1] if kind == "bullet" and MARKS["number"].match(body) else body
    return "", bare


def _questions(items: list[_Item]) -> list[str]:
    """Those of items of one class, without those that stand deeper than the first."""
    if not items:
        return []
    rest = [item.indent for item in items[1:]] or [0]
    first = min(rest) if items[0].indent == 0 else items[0].indent  # a text begins without its indent
    found = (question(item.text) for item in items if item.indent <= first + 1 and not item.choices)
    return _distinct(each for each in found if each)


def _unmarked(items: list[_Item], count: int) -> list[str]:
    """Of the first block of lines that is a list."""
    starts = [i for i, item in enumerate(items) if item.apart]
    for begin, end in zip(starts, [*starts[1:], len(items)]):
        asked = [question(item.text) if _is_question(item.text) else None for item in items[begin:end]]
        places = [i for i, each in enumerate(asked) if each]
        if len(places) >= max(count, LEAST) and places[-1] - places[0] + 1 == len(places):
            return _distinct(asked[i] for i in places)
    return []


def _is_question(line: str) -> bool:
    """Whether a whole line is one question."""
    return len(question(line) or "") >= len(line.strip("*_ \"'")) - 2


def _distinct(questions) -> list[str]:
    found: dict[str, str] = {}
    for each in questions:
        found.setdefault(" ".join(re.findall(r"\w+", each.casefold())), each)
    return list(found.values())


def _bare(text: str) -> str:
    """Without quotes and stars around the whole."""
    while len(text) > 1 and QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    while text[:2] in ("**", "__") and text[-2:] == text[:2] and len(text) > 4 and text[:2] not in text[2:-2]:
        text = text[2:-2].strip()
    return text


def _balanced(text: str) -> bool:
    pairs = (("(", ")"), ("[", "]"), ("\u201c", "\u201d"), ("\u300c", "\u300d"), ("\uff08", "\uff09"))
    return all(text.count(begin) == text.count(end) for begin, end in pairs) and not any(
        text.count(sign) % 2 for sign in '"*`'
    )


def parse_marked(text: str, count: int) -> list[str] | None:
    """The questions of a list as the published recipe reads it; None where they are not `count`.

    Each begins behind a mark, a number with one of : . ! ? - behind it, takes at least one character, and ends before
    the next mark or with the text. Numbers are not looked at, questions may be equal and have several lines, and what
    stands before the first mark is left out. A year that ends a sentence is a mark, too.
    """
    questions, mark = [], NUMBERED.search(text)
    while mark is not None and mark.end() < len(text):
        following = NUMBERED.search(text, mark.end() + 1)
        question = text[mark.end() : following.start() if following else len(text)].strip()
        if question:
            questions.append(EDGES.sub("", question) or question[-1])
        mark = following
    return questions if len(questions) == count else None
