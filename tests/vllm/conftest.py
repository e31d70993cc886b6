"""Tests against vLLM itself. `make test-vllm` runs them in its own environment; without vLLM they are no tests."""

from __future__ import annotations

import importlib.util
import os

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
# An engine computes in its own process, as with one GPU, and not in one more, whose imports take 20 s.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.engines.conftest import documents, model, tokenizer  # noqa: F401
from tests.generate.conftest import settings  # noqa: F401

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]
