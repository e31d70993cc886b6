"""Many requests at once: side by side until one fails for good, and no more than an engine is worth.

Retries and pauses between them are the engines' own; which documents go first is the caller's, by its numbers.

Tests: tests/generate/test_run.py.
"""

from __future__ import annotations

import asyncio
import heapq

from . import RequestFailed


async def side_by_side(*coroutines) -> list:
    """The results of all, in their order.

    The first error that is not one request's own ends the others and is raised.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        grave = [error for error in errors.exceptions if not isinstance(error, RequestFailed)]
        raise (grave or errors.exceptions)[0] from None
    return [task.result() for task in tasks]


class Gate:
    """At most `limit` at once; of those that wait, the lowest number enters first: documents begun are finished
    first.
    """

    def __init__(self, limit: int):
        self._free, self._waiting, self._arrivals = limit, [], 0

    async def enter(self, number: int) -> None:
        if self._free > 0:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._arrivals += 1
        heapq.heappush(self._waiting, (number, self._arrivals, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        while self._waiting:
            turn = heapq.heappop(self._waiting)[2]
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
