"""How good a model is at any length: RULER's tasks, own needle tasks, perplexity, the harness, published benchmarks.

tasks, texts --samples--> engine --answers--> scores by length and depth --> results.json, results.md, heatmap.png
"""

from .needles import load_tasks
from .report import Cell, Scores
from .run import EvaluateRun, evaluate
from .samples import Sample, score
from .tasks import TASKS, make_samples
from .text import Texts

__all__ = [
    "TASKS",
    "Cell",
    "EvaluateRun",
    "Sample",
    "Scores",
    "Texts",
    "evaluate",
    "load_tasks",
    "make_samples",
    "score",
]
