"""How good a model is at any length: RULER's tasks, own needle tasks, perplexity, the harness, published benchmarks.

tasks, texts --samples--> engine --answers--> scores by length and depth --> results.json, results.md, heatmap.png
"""

from ..lazy import public_names

__all__, __getattr__, __dir__ = public_names(
    __name__,
    {
        "comparison": ("Comparison", "compare"),
        "own": ("load_tasks",),
        "report": ("Cell", "Mean", "Scores"),
        "run": ("EvaluateRun", "evaluate"),
        "samples": ("Sample", "score"),
        "sources": ("Texts",),
        "tasks": ("TASKS", "make_samples"),
    },
)
