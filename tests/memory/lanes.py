"""A lane whose copies come as late as they may, shared by the tests of offload and of steps on the host."""

import threading
from collections import deque

from longpo_ops.memory.tiers import Lane


class LateLane(Lane):
    """A side stream at its slowest: a copy happens when somebody waits for it, not before."""

    def __init__(self):
        self.queue, self.lock, self.done = deque(), threading.RLock(), 0

    def now(self):
        return "computed"

    def copy(self, pairs, after):
        assert after == "computed"
        with self.lock:
            self.queue.extend(pairs)
            return self.done + len(self.queue)

    def hold(self, event):
        with self.lock:
            while self.done < event:
                to, origin = self.queue.popleft()
                to.copy_(origin)
                self.done += 1

    wait = hold

    def drain(self):
        self.hold(self.done + len(self.queue))
