"""What a finished run leaves beside its checkpoint: a figure of its curves and a model card.

Tests: tests/train/test_run.py.
"""

from __future__ import annotations

from pathlib import Path

from .checkpoints import packs_per_step

PANELS = {
    "rewards": ("rewards/chosen", "rewards/rejected"),
    "reward margin": ("rewards/margins",),
    "reward accuracy": ("rewards/accuracies",),
    "losses": ("loss", "preference_loss", "nll_loss", "kl"),
    "tokens per second": ("tokens_per_second",),
    "peak memory, GiB": ("peak_memory_gib",),
}


def draw_curves(history: list[dict], path: Path) -> None:
    """The numbers of Trainer's log_history against steps, one panel per kind that was logged, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {title: [n for n in names if any(n in row for row in history)] for title, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    figure, axes = plt.subplots(2, (len(panels) + 1) // 2, figsize=(4 * ((len(panels) + 1) // 2), 6), squeeze=False)
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            points = [(row["step"], row[name]) for row in history if name in row]
            axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 20 else None)
        axis.set_title(title, fontsize=10, y=1.0)  # a place that is to be found costs a layout
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.1, top=0.93, wspace=0.25, hspace=0.45)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_report(trainer, base: str, recipe: str) -> None:
    """training.png and README.md in the run's output folder. `base` names the model it started from, `recipe` is the
    title of what was followed."""
    folder, history = Path(trainer.args.output_dir), trainer.state.log_history
    rows = [row for row in history if "nll_loss" in row or "preference_loss" in row]
    if rows:
        draw_curves(rows, folder / "training.png")
    (folder / "README.md").write_text(_card(trainer, base, recipe, rows), encoding="utf-8", errors="backslashreplace")


def _card(trainer, base: str, recipe: str, rows: list[dict]) -> str:
    args = trainer.args
    settings = {
        "recipe": recipe,
        "method": args.objective,
        "objective": trainer.objective or "none (supervised)",
        "reference": f"{args.reference}, reads the {trainer.method.reference} input"
        if trainer.method.reference
        else "none",
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
        "pairs": len(trainer.train_dataset.pairs),
        "steps": trainer.state.global_step,
        "packs a step": packs_per_step(args),
        "seed": args.seed,
    }
    lines = [
        f"# {Path(args.output_dir).resolve().name}",
        "",
        f"Trained from `{base}` with longpo_ops on short-to-long preference pairs.",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items()),
    ]
    if rows:
        names = [n for panel in PANELS.values() for n in panel if n in rows[-1]]
        lines += ["", "| | first log | last log |", "|---|---|---|"]
        lines += [f"| {n} | {rows[0].get(n, float('nan')):.4g} | {rows[-1][n]:.4g} |" for n in names]
        lines += ["", "![curves](training.png)"]
    return "\n".join(lines) + "\n"
