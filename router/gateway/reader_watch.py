"""Clients that stop reading: each holds what its connection buffers and what one request may still give, for a while.

gRPC's flow control makes `write` wait once a client reads no more (its HTTP/2 window, and WRITE_BUFFER_BYTES here, are
full). Meanwhile the link merges the stream's tokens into one record, so it holds up nobody. A write that waits longer
than the limit ends the stream with an error: its work and its KV are worth more to others. One timer looks at all
streams now and then, as a timeout for each write would cost more than the write."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from ...errors import SlowReader

WRITE_BUFFER_BYTES = 16 << 10  # of a stream, in the gateway's process; beyond it a write waits for the client
STALL_S = 30.0
Write = Callable[[bytes], Awaitable[None]]


class ReaderWatch:
    """All streams that are being written. `stall_s`: how long a write may wait for its client."""

    def __init__(self, stall_s: float = STALL_S) -> None:
        self._stall_s = stall_s
        self._streams: set[_Watched] = set()
        self._timer: asyncio.TimerHandle | None = None

    def num_stalled(self, for_s: float) -> int:
        """Streams whose present write has waited so long."""
        now = asyncio.get_running_loop().time()
        return sum(stream.waited_s(now) >= for_s for stream in self._streams)

    @asynccontextmanager
    async def watched(self, write: Write) -> AsyncIterator[Write]:
        """`write` for one stream. SlowReader is raised inside when the client has not read for too long."""
        task = asyncio.current_task()
        assert task is not None
        stream = _Watched(write, task)
        self._streams.add(stream)
        if self._timer is None:
            self._look_later()
        try:
            yield stream.write
        except asyncio.CancelledError:
            if not stream.given_up:
                raise
            task.uncancel()
            raise SlowReader(f"did not read for {self._stall_s:g} s") from None
        finally:
            self._streams.discard(stream)

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._stall_s / 4, self._look)

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        for stream in self._streams:
            if stream.waited_s(now) >= self._stall_s and not stream.given_up:
                stream.give_up()
        self._timer = None
        if self._streams:
            self._look_later()


class _Watched:
    __slots__ = ("_loop", "_since", "_task", "_write", "given_up")

    def __init__(self, write: Write, task: "asyncio.Task[object]") -> None:
        self._write, self._task, self._loop = write, task, asyncio.get_running_loop()
        self._since = 0.0  # when the present write began; 0 = there is none
        self.given_up = False

    async def write(self, data: bytes) -> None:
        self._since = self._loop.time()
        await self._write(data)
        self._since = 0.0

    def waited_s(self, now: float) -> float:
        return now - self._since if self._since else 0.0

    def give_up(self) -> None:
        self.given_up = True
        self._task.cancel()
