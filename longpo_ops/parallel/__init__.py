"""One packed row on several processes: which rows each holds, and what they agree on."""

from .shards import Shards

__all__ = ["Shards"]
