"""Where servers are, and the keys to them: checked before anything is sent, and never repeated.

    URL       scheme://host[:port]/path, such as http://127.0.0.1:8000/v1
    shown()   the same with *** and six digits of a digest for every part of the path that looks like a key

Some gateways take a key as a part of the path. Messages, reports and settings files hold `shown` alone. A part looks like
a key where it begins as keys do (KEY_BEGINS), or where its words, which are what is between the signs - _ . and others,
are random by their looks:

    length    a word of 20 or more characters, or of 12 or more with both letters and digits
    changes   between small letters, capitals and digits, within a word: 5 or more in one, or 8 in all

So names of models, deployments and versions are shown (qwen2.5-72b-instruct, v1beta1), and two keys have two digests. Not
covered: a key that is short, or made of words as names are. User names, passwords, queries and fragments are refused. A
host is an address, and is shown.
"""

from __future__ import annotations

import hashlib
import os
import re
from urllib.parse import unquote, urlsplit

KEY = "OPENAI_API_KEY"
KEY_BEGINS = re.compile(r"((sk|pk|gsk|nvapi|glpat)[-_]|(hf|ghp)_).")
RUN = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")


def check_url(url: str, what: str = "endpoint") -> str:
    """The URL without a last slash. Raises ValueError, without repeating the URL, for one that is none or holds more than an
    address."""
    wanted = "expected a URL such as http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        right = right and re.fullmatch(r"[!-~]+", url.replace(parts.netloc, _ascii(parts.netloc), 1))
    except ValueError:  # of a port that is no number, brackets that do not close, or a host that no name server knows
        right = False
    if not right:
        raise ValueError(f"{what}: no valid URL came; {wanted} (what came is not repeated, as it may hold a key)")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"{what}: the one at {parts.hostname} holds a user, a query or a fragment; {wanted}, and the key in an "
            "environment variable"
        )
    return url.rstrip("/")


def shown(url: str) -> str:
    """A checked URL as it may be repeated. What is shown already stays as it is."""
    parts = urlsplit(url)
    path = [f"***{_digest(each)}" if _is_key(each) else each for each in parts.path.split("/")]
    return f"{parts.scheme}://{parts.netloc}{'/'.join(path)}"


def secrets(url: str) -> list[str]:
    """The parts of a checked URL that are not shown, as they stand there and decoded, the longest first."""
    hidden = [each for each in urlsplit(url).path.split("/") if _is_key(each)]
    return sorted({*hidden, *map(unquote, hidden)}, key=len, reverse=True)


def _is_key(part: str) -> bool:
    words = re.findall(r"[^\W_]+", text := unquote(part))
    changes = [len(RUN.findall(word)) - 1 for word in words]
    return (
        bool(KEY_BEGINS.match(text)) or any(map(_is_long, words)) or max(changes, default=0) >= 5 or sum(changes) >= 8
    )


def _is_long(word: str) -> bool:
    mixed = re.search("[0-9]", word) and re.search("[A-Za-z]", word)
    return len(word) >= (12 if mixed else 20)


def _digest(part: str) -> str:
    return hashlib.sha256(part.encode()).hexdigest()[:6]


def _ascii(netloc: str) -> str:
    """A host as it is asked for, where it has letters beyond ASCII. Raises ValueError for one that cannot be."""
    if netloc.isascii():
        return netloc
    import httpx

    try:
        return httpx.URL(f"http://{netloc}").netloc.decode()
    except httpx.InvalidURL as error:
        raise ValueError from error


def read_key(variable: str) -> str:
    """The key in an environment variable, or "". Raises ValueError, without repeating it, for one that no header can hold."""
    key = os.environ.get(variable, "").strip()
    if wrong := [i for i, character in enumerate(key, 1) if not "!" <= character <= "~"]:
        raise ValueError(
            f"the API key in ${variable} has a character that no key has, number {wrong[0]} of {len(key)}: expected letters, "
            "digits and signs of ASCII without spaces; copy it again"
        )
    return key
