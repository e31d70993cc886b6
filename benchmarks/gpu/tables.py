"""Rows of gpu_check.json as tables: the same cells for a page (markdown) and for a terminal (aligned).

Times, memory and errors are rounded up, rates and shares down, to three digits or the whole number: no figure looks better
than what was measured. A row has names and a status; any of its numbers may be missing, and numbers that are not known here are
left out. A group of rows is told by the numbers it has, not by its question's name, so that new questions need nothing here.

Tests: tests/benchmarks/gpu/test_report.py.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from decimal import ROUND_DOWN, ROUND_UP, Decimal
from typing import NamedTuple

MIB, GIB = 1 << 20, 1 << 30
NAMES = ("question", "what", "backend", "case")
STATES = ("passed", "measured", "skipped", "failed")
OURS = ("fused_preference_loss", "linear_cross_entropy")


class Table(NamedTuple):
    header: tuple[str, ...]
    lines: list[tuple[str, ...]]

    def markdown(self) -> str:
        cells = [self.header, ("---",) * len(self.header), *(tuple(map(_escaped, line)) for line in self.lines)]
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)

    def aligned(self) -> list[str]:
        """Lines for a terminal: the first column to the left and at most 60 wide, the others to the right and 28."""
        lines = [(_cut(line[0], 60), *(_cut(cell, 28) for cell in line[1:])) for line in (self.header, *self.lines)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]

    def without(self, *names: str) -> Table:
        keep = [place for place, name in enumerate(self.header) if name not in names]
        header, *lines = ([line[place] for place in keep] for line in (self.header, *self.lines))
        return Table(tuple(header), list(map(tuple, lines)))


def _escaped(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").split())


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


# ---- numbers ---------------------------------------------------------------------------------------------------------


def up(value, unit: float = 1) -> str:
    """Times, memory, errors: away from zero."""
    return _rounded(value, unit, ROUND_UP)


def down(value, unit: float = 1) -> str:
    """Rates and shares: towards zero."""
    return _rounded(value, unit, ROUND_DOWN)


def percent(value) -> str:
    """An error relative to what was planned, with its sign."""
    text = up(value, 0.01)
    return text and f"{'' if text.startswith('-') else '+'}{text} %"


def _rounded(value, unit: float, direction: str) -> str:
    """value / unit in three digits, more where the whole number has more; "" for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if not math.isfinite(value):
        return str(value)
    exact = Decimal(repr(value)) / Decimal(repr(unit))
    places = max(0, 2 - exact.adjusted()) if exact else 0
    return f"{exact.quantize(Decimal(1).scaleb(-places), direction):,}"


def number(row: dict, key: str) -> float | None:
    """row[key], if it is a number that can be computed with."""
    value = row.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


# ---- rows ------------------------------------------------------------------------------------------------------------


def named(row: dict) -> dict:
    """A row that has all names and a status, each a line of text, whatever wrote it."""
    return row | {key: " ".join(str(row.get(key) or "").split()) for key in (*NAMES, "status")}


def state(row: dict) -> str:
    """passed, measured, skipped or failed; whatever else a row says is told as it stands."""
    return row["status"].partition(":")[0]


def failed(row: dict) -> bool:
    return state(row) == "failed"


def reason(row: dict) -> str:
    return row["status"].partition(":")[2].strip() or row["status"]


def merged(contents: list[dict]) -> list[dict]:
    """The rows of several reports, each with "run", the number of its report. A later row takes the place of an earlier one
    of its name, unless it was skipped and the earlier was not; "first" is the failure that came before it."""
    found: dict[tuple, dict] = {}
    for run, content in enumerate(contents, 1):
        for row in map(named, content["rows"]):
            earlier = found.get(key := tuple(row[name] for name in NAMES))
            if earlier and state(row) == "skipped" and state(earlier) != "skipped":
                continue
            if earlier and state(earlier) == "failed":
                row = {"first": earlier["status"]} | row
            found[key] = row | {"run": run}
    return list(found.values())


def label(row: dict, *keys: str) -> str:
    return ", ".join(filter(None, (row[key] for key in keys)))


def _in_state(rows: list[dict], wanted: str) -> list[dict]:
    return [row for row in rows if state(row) == wanted]


def failures(rows: list[dict]) -> Table | None:
    found = [(r["question"], label(r, "what", "backend"), r["case"], reason(r)) for r in _in_state(rows, "failed")]
    return Table(("question", "what", "case", "why"), found) if found else None


def second_tries(rows: list[dict]) -> Table | None:
    """Rows that failed first and not when asked again."""
    found = [
        (r["question"], label(r, "what", "backend"), r["case"], r["status"], str(r["first"]).partition(": ")[2])
        for r in rows
        if state(r) != "failed" and str(r.get("first", "")).startswith("failed")
    ]
    return Table(("question", "what", "case", "now", "failed first"), found) if found else None


def questions(rows: list[dict]) -> Table:
    """Per question how many rows passed, were measured, skipped and failed, and what they took."""
    lines = []
    for question in dict.fromkeys(row["question"] for row in rows):
        own = [row for row in rows if row["question"] == question]
        counts = Counter(state(row) if state(row) in STATES else "other" for row in own)
        if counts["other"]:
            question = f"{question} ({counts['other']} of no known status)"
        took = sum(number(row, "took") or 0 for row in own)
        compiled = sum(number(row, "compiled") or 0 for row in own)
        lines.append((question, *(str(counts[name] or "") for name in STATES), up(took), str(compiled or "")))
    return Table(("question", *STATES, "seconds", "kernels compiled"), lines)


def skipped(rows: list[dict]) -> Table | None:
    """Why rows were skipped: a line per question, function and reason, whose numbers are those of its first row."""
    groups: dict[tuple, list[dict]] = {}
    for row in _in_state(rows, "skipped"):
        groups.setdefault((row["question"], label(row, "what", "backend"), _unnumbered(row)), []).append(row)
    lines = [(q, what, str(len(own)), own[0]["case"], reason(own[0])) for (q, what, _), own in groups.items()]
    return Table(("question", "what", "rows", "the first", "why"), lines) if lines else None


def _unnumbered(row: dict) -> str:
    return re.sub(r"\d+(\.\d+)?", "#", reason(row))


# ---- what was measured -----------------------------------------------------------------------------------------------

Columns = dict[str, Callable[[dict], str]]


def _table(rows: list[dict], columns: Columns) -> Table | None:
    """The rows and what `columns` say of each; with the number of its run, unless all are of the first."""
    if any(row["run"] > 1 for row in rows):
        columns = columns | {"run": lambda row: str(row["run"])}
    lines = [tuple(cell(row) for cell in columns.values()) for row in rows]
    return Table(tuple(columns), lines) if lines else None


def _or_status(key: str) -> Callable[[dict], str]:
    """A time, or why there is none."""
    return lambda row: up(row.get(key)) or row["status"]


def _size(row: dict) -> str:
    """The size of a loss that a case begins with, "" where it begins otherwise."""
    found = re.match(r"N=\d+ H=\d+ V=\d+", row["case"])
    return found[0] if found else ""


def is_loss(row: dict) -> bool:
    """Of ours or a peer's, be it timed or not."""
    return bool(_size(row)) and ("delivered_gradient_bytes" in row or row["question"] == "loss")


def is_ours(row: dict) -> bool:
    return row["what"] in OURS


def losses(rows: list[dict]) -> dict[str, list[dict]]:
    """size -> the losses of that size, the fastest first; sizes as the report has them."""
    sizes: dict[str, list[dict]] = {}
    for row in filter(is_loss, rows):
        sizes.setdefault(_size(row), []).append(row)
    return {size: sorted(own, key=lambda row: number(row, "milliseconds") or math.inf) for size, own in sizes.items()}


def loss_label(row: dict) -> str:
    """Whose loss, on which back-end, with which options."""
    return label(row | {"option": row["case"].removeprefix(_size(row)).strip()}, "what", "backend", "option")


def extra_bytes(row: dict) -> float | None:
    """Peak memory beyond what was there, and beyond the gradients that are delivered."""
    peak = number(row, "peak_extra_bytes")
    return None if peak is None else peak - (number(row, "delivered_gradient_bytes") or 0)


def loss_table(rows: list[dict]) -> Table | None:
    """A line per size and implementation."""
    fastest: dict[str, float] = {}  # of the peers, by size
    for size, own in losses(rows).items():
        peers = [ms for row in own if not is_ours(row) and (ms := number(row, "milliseconds"))]
        fastest |= {size: peers[0]} if peers else {}

    def against_peers(row: dict) -> str:
        ms, peer = number(row, "milliseconds"), fastest.get(_size(row))
        return down(peer / ms) if ms and peer else ""

    columns: Columns = {
        "loss, forward and backward": lambda row: f"{loss_label(row)} {row.get('version') or ''}".strip(),
        "size": _size,
        "ms": _or_status("milliseconds"),
        "TFLOP/s": lambda row: down(row.get("tflops")),
        "share of matmul": lambda row: down(row.get("fraction_of_matmul")),
        "fastest peer / this": against_peers,
        "extra, MiB": lambda row: up(extra_bytes(row), MIB),
        "gradients, MiB": lambda row: up(row.get("delivered_gradient_bytes"), MIB),
    }
    return _table([row for own in losses(rows).values() for row in own], columns)


def loss_headline(rows: list[dict]) -> Table | None:
    """A line per implementation, without options, ours first; two lengths of the first vocabulary beside each other."""
    sizes = losses([row for row in rows if row["case"] == _size(row)])
    if not sizes:
        return None
    common = next(iter(sizes)).partition(" ")[2]
    shown = {size.partition(" ")[0]: own for size, own in sizes.items() if size.endswith(" " + common)}
    shown = dict(list(shown.items())[:2])
    cells: dict[str, dict[str, tuple[str, ...]]] = {}
    for length, own in shown.items():
        for row in sorted(own, key=is_ours, reverse=True):
            ms = up(row.get("milliseconds")) or state(row)
            rates = down(row.get("tflops")), down(row.get("fraction_of_matmul"))
            cells.setdefault(loss_label(row), {})[length] = (ms, *rates, up(extra_bytes(row), MIB))
    header = [name for length in shown for name in (f"{length}: ms", "TFLOP/s", "of matmul", "extra MiB")]
    lines = [
        (name, *(cell for length in shown for cell in found.get(length, ("",) * 4))) for name, found in cells.items()
    ]
    return Table((f"loss, {common}", *header), lines)


STEP_NUMBERS = ("seconds", "predicted_seconds", "peak_device_bytes", "predicted_peak_bytes")


def steps(rows: list[dict]) -> list[dict]:
    """Whole steps, and what was to be one: rows of a question some of whose rows have a step's numbers."""
    asked = {row["question"] for row in rows if any(key in row for key in STEP_NUMBERS)}
    return [row for row in rows if row["question"] in asked and "milliseconds" not in row]


def step_table(rows: list[dict]) -> Table | None:
    """Planner's errors are measured / planned - 1, where the row says what of a plan it can be held against."""
    columns: Columns = {
        "step": lambda row: label(row, "what", "backend", "case"),
        "seconds": _or_status("seconds"),
        "tokens/s": lambda row: down(row.get("tokens_per_s")),
        "TFLOP/s": lambda row: down(row.get("tflops")),
        "peak, GiB": lambda row: up(row.get("peak_device_bytes"), GIB),
        "planned, GiB": lambda row: up(row.get("predicted_peak_bytes"), GIB),
        "peak error": lambda row: percent(row.get("planner_error_peak")),
        "planned, s": lambda row: up(row.get("predicted_seconds")),
        "time error": lambda row: percent(row.get("planner_error_seconds")),
        "host, GiB": lambda row: up(row.get("peak_host_bytes"), GIB),
        "compared": compared,
        "also": also,
    }
    return _table(steps(rows), columns)


def compared(row: dict) -> str:
    """With the same work done the other way: a pair as two sequences, nothing offloaded, one copy."""
    shares = row.get("share_of_one_copy")
    told = {
        "faster": down(row.get("faster")),
        "memory": up(row.get("memory")),
        "the kept one's time": up(row.get("times_kept")),
    } | {f"copy {way}": down(share) for way, share in (shares.items() if isinstance(shares, dict) else ())}
    return ", ".join(f"{value}x {name}" for name, value in told.items() if value)


TOLD = (  # what has a column, or is of no interest beside a step
    *NAMES, "status", "at", "took", "expected", "compiled", "first", "run", "seconds", "tokens_per_s", "tflops",
    "peak_device_bytes", "predicted_peak_bytes", "planner_error_peak", "predicted_seconds", "planner_error_seconds",
    "peak_host_bytes", "faster", "memory", "times_kept", "share_of_one_copy",
)  # fmt: skip


def also(row: dict) -> str:
    """The other numbers of a row, those in groups too, to four digits; its settings; why something could not be had."""
    others = {key: value for key, value in row.items() if key not in (*TOLD, "settings")}
    groups = {
        f"{key} {name}": x for key, group in others.items() if isinstance(group, dict) for name, x in group.items()
    }
    told = [
        f"{key.replace('_', ' ')} {_plain(key, value)}"
        for key, value in (others | groups).items()
        if _plain(key, value)
    ]
    settings = row.get("settings")
    chosen = settings.items() if isinstance(settings, dict) else ()
    told += [f"{key.replace('_', ' ')} {value}" for key, value in chosen if value not in (None, False, 0)]
    return ", ".join([*told, *filter(None, [str(row.get("no_8bit_states") or "")])])


def _plain(key: str, value) -> str:
    """A number with its unit, as its name tells it; "" for what is none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return ""
    if "bytes_per_second" in key:
        return f"{value / 1e9:.4g} GB/s"
    return f"{value / GIB:.4g} GiB" if key.endswith("bytes") else f"{value:.4g}"


def speed_table(rows: list[dict]) -> Table | None:
    """Whatever else was timed: ceilings, products, epilogues, copies."""
    columns: Columns = {
        "what": lambda row: label(row, "what", "backend"),
        "case": lambda row: row["case"],
        "ms": _or_status("milliseconds"),
        "TFLOP/s": lambda row: down(row.get("tflops")),
        "share of matmul": lambda row: down(row.get("fraction_of_matmul")),
        "GB/s": lambda row: down(row.get("gigabytes_per_second")),
        "share of copy": lambda row: down(row.get("fraction_of_copy")),
        "extra, MiB": lambda row: up(extra_bytes(row), MIB),
    }
    timed = ("milliseconds", "gigabytes_per_second")
    others = [row for row in rows if any(key in row for key in timed) and not is_loss(row)]
    return _table(others, columns)


def accuracy_table(rows: list[dict]) -> Table | None:
    """Per function how much of its error budget the worst passed row took, and which that was."""
    groups: dict[tuple, list[tuple[float, dict]]] = {}
    for row in _in_state(rows, "passed"):
        error, allowed = number(row, "error"), number(row, "allowed")
        if error is not None and allowed:
            groups.setdefault((row["question"], row["what"], row["backend"]), []).append((error / allowed, row))
    lines = []
    for names, own in groups.items():
        used, row = max(own, key=lambda pair: pair[0])
        lines.append(
            (
                *names,
                str(len(own)),
                up(used),
                label(row | {"tightest": str(row.get("tightest", ""))}, "case", "tightest"),
            )
        )
    return Table(("question", "function", "back-end", "rows", "error / allowed", "where"), lines) if lines else None
