"""Where servers are, and the keys to them: checked before anything is sent, and never repeated.

    URL       scheme://host[:port]/path, such as http://127.0.0.1:8000/v1
    shown()   the same with *** for every part of the path that is neither a version nor in PLAIN

Some gateways take a key as a part of the path, and no look at a part tells a key from a name. So messages, reports and
settings files hold `shown` alone, which knows the parts that servers commonly have. User names, passwords, queries and
fragments are refused. A host is an address, and is shown.
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urlsplit

KEY = "OPENAI_API_KEY"
VERSION = re.compile(r"v\d{1,2}((alpha|beta)\d{0,2})?")
PLAIN = {"api", "openai", "llm", "ai", "inference", "compatible-mode", "deployments", "engines", "models", "serverless"}
PLAIN |= {"chat", "completions", "endpoints", "serving-endpoints", "generativelanguage", "proxy", ""}


def check_url(url: str, what: str = "endpoint") -> str:
    """The URL without a last slash. Raises ValueError, without repeating the URL, for one that is none or holds more than an
    address."""
    wanted = "expected a URL such as http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of a port that is no number, or brackets that do not close
        right = False
    if not right or not re.fullmatch(r"[!-~]+", url):
        raise ValueError(f"{what}: no valid URL came; {wanted} (what came is not repeated, as it may hold a key)")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"{what}: the one at {parts.hostname} holds a user, a query or a fragment; {wanted}, and the key in an "
            "environment variable"
        )
    return url.rstrip("/")


def shown(url: str) -> str:
    """A checked URL as it may be repeated."""
    parts = urlsplit(url)
    path = [each if _is_plain(each) else "***" for each in parts.path.split("/")]
    return f"{parts.scheme}://{parts.netloc}{'/'.join(path)}"


def secrets(url: str) -> list[str]:
    """The parts of a checked URL that are not shown, as they stand there and decoded, the longest first; those of fewer than
    four characters are no keys."""
    hidden = [each for each in urlsplit(url).path.split("/") if len(each) > 3 and not _is_plain(each)]
    return sorted({*hidden, *map(unquote, hidden)}, key=len, reverse=True)


def _is_plain(part: str) -> bool:
    return part in PLAIN or VERSION.fullmatch(part) is not None


def read_key(variable: str) -> str:
    """The key in an environment variable, or "". Raises ValueError, without repeating it, for one that no header can hold."""
    key = os.environ.get(variable, "").strip()
    if wrong := [i for i, character in enumerate(key, 1) if not "!" <= character <= "~"]:
        raise ValueError(
            f"the API key in ${variable} has a character that no key has, number {wrong[0]} of {len(key)}: expected letters, "
            "digits and signs of ASCII without spaces; copy it again"
        )
    return key
