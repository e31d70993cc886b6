"""Short-to-long preference pairs from a folder of long documents, made by the model itself.

documents --select--> tasks --Steps(engine)--> pairs --Store--> a folder that `longpo train` reads
"""

from ..lazy import public_names

__all__, __getattr__, __dir__ = public_names(
    __name__,
    {
        "filters": ("Filters", "PublishedFilters"),
        "prompts": ("Prompts",),
        "run": ("GenerateRun", "Result", "check", "generate", "generate_and_summarise"),
        "selection": ("select",),
    },
)
