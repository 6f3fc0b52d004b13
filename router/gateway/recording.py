"""The events of one stream as they are made, for readers that come, go and come back.

A resumable stream is not tied to a call: it is made into a recording, and calls read that from any offset. Events are
kept until the last reader has left, so a reader that stalls holds up nobody; a recording is bounded by the context."""

import asyncio
from collections.abc import Awaitable, Callable

from ...errors import InvalidRequest


class Recording:
    """One writer (`write`, then `end`), any number of readers."""

    __slots__ = ("_changed", "_error", "ended", "events", "num_readers")

    def __init__(self) -> None:
        self.events: list[bytes] = []  # by offset
        self.ended = False
        self.num_readers = 0
        self._error: BaseException | None = None
        self._changed = asyncio.Event()

    async def write(self, event: bytes) -> None:
        self.events.append(event)
        self._wake()

    def end(self, error: BaseException | None = None) -> None:
        """Readers get what there is, then `error`."""
        self.ended, self._error = True, error
        self._wake()

    async def read(self, offset: int, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Give every event from `offset` on, to the end of the stream."""
        while True:
            while offset < len(self.events):
                await write(self.events[offset])
                offset += 1
            if self.ended:
                break
            await self._changed.wait()
        if self._error is not None:
            raise self._error
        if offset > len(self.events):
            raise InvalidRequest("from_offset", offset, f"0..{len(self.events)}, what the stream has")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
