"""Draws memory and time against length from the dated JSON of training/step.py: one line per model and variant.

python -m benchmarks.plot [--results FOLDER] [--out FILE.png]

Tests: tests/benchmarks/training/test_step.py.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from .stamp import RESULTS

GIB = 2**30
PANELS = {"device memory, GiB": "device", "host memory, GiB": "host", "seconds of a step": "seconds"}


def read(folder: Path) -> dict[str, list[dict]]:
    """Line name -> its points, sorted by length; of several files with the same point the newest. Rehearsals are left out."""
    points: dict[tuple, dict] = {}
    for path in sorted(folder.glob("step_*.json")):  # the date is in the name
        report = json.loads(path.read_text())
        shape = report["shape"]
        if report["rehearsal"] or shape["backward_layers"]:
            continue
        depth = f", {shape['layers']} layers" if shape["layers"] else ""
        for row in report["rows"]:
            if row["status"] == "measured":
                points[f"{shape['model']}{depth}: {row['variant']}", shape["length"]] = {
                    "length": shape["length"],
                    "device": row["peak_device_bytes"] and row["peak_device_bytes"] / GIB,
                    "host": row["peak_host_bytes"] / GIB,
                    "seconds": row["seconds"],
                    "predicted": row.get("predicted_peak_bytes", 0) / GIB or None,
                }
    lines = defaultdict(list)
    for (name, _), point in sorted(points.items(), key=lambda item: item[0]):
        lines[name].append(point)
    return dict(lines)


def draw(lines: dict[str, list[dict]], path: Path) -> None:
    """Three panels; what the planner predicted for device memory is dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(5 * len(PANELS), 4.5))
    for axis, (title, key) in zip(axes, PANELS.items()):
        for number, (name, points) in enumerate(lines.items()):
            for what, style in ((key, "-"), ("predicted", "--")) if key == "device" else ((key, "-"),):
                seen = [(p["length"], p[what]) for p in points if p[what] is not None]
                if seen:
                    label = name if style == "-" else None
                    axis.plot(*zip(*seen), style, color=f"C{number % 10}", label=label, marker=".")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens of the row")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[-1].set_yscale("log")
    axes[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    lines = read(options.results)
    if not lines:
        print(f"{options.results.name} holds no measured step: run `python -m benchmarks.training.step` on a GPU first")
        return 1
    path = options.out or options.results / "step.png"
    draw(lines, path)
    print(f"{len(lines)} lines in {path.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
