"""One packed row on several processes: which rows each holds, and what they agree on."""

from .groups import alike, digest, group_named
from .shards import Shards

__all__ = ["Shards", "alike", "digest", "group_named"]
