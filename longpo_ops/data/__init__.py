"""Preference pairs from files to packed batches: read, tokenise, pack.

    files --read_pairs--> Pair --ChatFormat.tokenize--> TokenizedPair --pack--> PairBatch

`tokenized_pairs` does the first two steps for text and for tokenised files alike.
"""

from .batch import PairBatch, TreeBatch, pack, pack_tree, pack_within, packed_length, spread_positions
from .chat import ChatFormat, join_context, tokenized_pairs
from .context import ContextPair
from .layout import PairSpans, SharedPrefixLayout
from .pairs import Pair, Turn, read_pairs, write_pairs
from .records import BadRecord, DataReport
from .tokenized import TokenizedPair, TokenSequence, read_tokenized, tokenizer_fingerprint, write_tokenized

__all__ = [
    "BadRecord",
    "ChatFormat",
    "ContextPair",
    "DataReport",
    "Pair",
    "PairBatch",
    "PairSpans",
    "SharedPrefixLayout",
    "TokenSequence",
    "TokenizedPair",
    "TreeBatch",
    "Turn",
    "join_context",
    "pack",
    "pack_tree",
    "pack_within",
    "packed_length",
    "read_pairs",
    "read_tokenized",
    "spread_positions",
    "tokenized_pairs",
    "tokenizer_fingerprint",
    "write_pairs",
    "write_tokenized",
]
