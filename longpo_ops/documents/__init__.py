"""Local documents: found, read from any common format, and parted into chunks. Used by generate and evaluate alike.

Which of them a run takes is the run's own matter; pairs and tokenised records are longpo_ops.data's.
"""

from ..lazy import public_names

__all__, __getattr__, __dir__ = public_names(
    __name__,
    {
        "chunks": ("Chunker",),
        "listing": ("Document", "Listing", "find_files", "read_documents"),
        "paragraphs": ("JOIN", "Gatherer", "is_latex"),
    },
)
