"""The tokenizer of tests/engines."""

from tests.engines.conftest import tokenizer  # noqa: F401
