"""Short-to-long preference pairs from a folder of long documents, made by the model itself.

documents --select--> tasks --Steps(engine)--> pairs --Store--> a folder that `longpo train` reads
"""

from .documents import Chunker, Document, Listing, find_files, read_documents
from .engines import Completion, Engine, EngineStopped, Request, RequestFailed, Sampling
from .filters import Filters
from .prompts import Prompts
from .run import GenerateRun, Result, generate, select

__all__ = [
    "Chunker",
    "Completion",
    "Document",
    "Engine",
    "EngineStopped",
    "Filters",
    "GenerateRun",
    "Listing",
    "Prompts",
    "Request",
    "RequestFailed",
    "Result",
    "Sampling",
    "find_files",
    "generate",
    "read_documents",
    "select",
]
