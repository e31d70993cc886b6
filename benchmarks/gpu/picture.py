"""One picture per card: the loss of every implementation beside its ceiling, and peaks of whole steps, planned and measured.

Needs matplotlib; where it is missing, or nothing was measured, no picture is drawn.

Tests: tests/benchmarks/gpu/test_report.py.
"""

from __future__ import annotations

from pathlib import Path

from .tables import GIB, is_ours, label, loss_label, losses, number, steps


def draw(card: str, rows: list[dict], path: Path) -> bool:
    """Whether there was something to draw, and something to draw with."""
    timed = {size: [row for row in own if number(row, "milliseconds")] for size, own in losses(rows).items()}
    sizes = [size for size, own in timed.items() if own]
    whole = [row for row in steps(rows) if number(row, "peak_device_bytes") and number(row, "predicted_peak_bytes")]
    panels = len(sizes) + bool(whole)
    try:
        import matplotlib
    except ImportError:
        return False
    if not panels:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(panels, 1, figsize=(9, 1 + 2.2 * panels), squeeze=False, layout="constrained")
    for axis, size in zip(axes[:, 0], sizes):
        _losses(axis, size, timed[size])
    if whole:
        _steps(axes[-1, 0], whole)
    figure.suptitle(card)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True


def _losses(axis, size: str, rows: list[dict]) -> None:
    """Milliseconds of each; the dashed line is what the matrix products alone take at the measured ceiling."""
    names = [loss_label(row) for row in rows]
    axis.barh(names, [row["milliseconds"] for row in rows], color=["C0" if is_ours(row) else "C7" for row in rows])
    shares = [(row["milliseconds"], share) for row in rows if (share := number(row, "fraction_of_matmul"))]
    if shares:
        axis.axvline(min(ms * share for ms, share in shares), color="k", linestyle="--", label="products alone")
        axis.legend(fontsize=7)
    axis.set_title(f"loss, forward and backward, ms: {size}", fontsize=9)
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)


def _steps(axis, rows: list[dict]) -> None:
    """Peak memory of the device: a bar as measured, a mark as planned."""
    names = [label(row, "what", "backend", "case") for row in rows]
    axis.barh(names, [row["peak_device_bytes"] / GIB for row in rows], color="C0", label="measured")
    axis.plot([row["predicted_peak_bytes"] / GIB for row in rows], names, "k|", markersize=14, label="planned")
    axis.set_title("whole steps, peak of the device, GiB", fontsize=9)
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7)
