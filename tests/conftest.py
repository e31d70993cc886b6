"""What every test process shares: no network, quiet tokenisers, Ctrl-C, the same property-test examples in every run."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
from hypothesis import settings

# A suite that a shell started in the background ignores SIGINT, and so would the runs that tests stop with it.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
