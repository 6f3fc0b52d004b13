"""What a resumable stream said, in Redis, so that any gateway can go on with it: the whole request, then its tokens.

A journal is two keys in one hash slot, `{owner/request}`: a hash (head, fence, end) and the list of outputs as the
engine gave them, each written before its events are sent. Events follow from outputs alone (`conversation.py` is a pure
fold), so whoever replays the list gives the same events at the same offsets.

The fence says who may write: `take` raises it, and the one before is refused from then on. So a gateway that was only
thought to be dead stops, and a stream has one author at any time. An output carries its place: sent twice, since nobody
knows whether the first was written, it is in once. Outputs of all requests that are ready together go in one pipeline:
one round trip a step, whatever the number of streams. Both keys expire a short time after the last write."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import NotFound, SessionStoreUnavailable, Unavailable
from .redis_connection import RedisConnection, failure
from .session import PREFIX

MAX_BATCH = 1024  # appends in one pipeline
RETRY_S = 0.5  # between attempts to write what waits for Redis
_log = logging.getLogger(__name__)

# KEYS meta, outputs; ARGV head, ttl ms, name of this beginning. 1 = begun (also when run twice), 0 = there is one.
_BEGIN = """
if redis.call('HGET', KEYS[1], 'begun') == ARGV[3] then return 1 end
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], 'head', ARGV[1], 'fence', 1, 'begun', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""

# KEYS meta, outputs; ARGV fence, ttl ms, number of outputs before these, end ("" = not yet), outputs...
# 1 = written, now or before; 0 = fenced off; -1 = the journal is gone or has lost outputs.
_APPEND = """
local fence = redis.call('HGET', KEYS[1], 'fence')
if not fence then return -1 end
if fence ~= ARGV[1] then return 0 end
local written, place = redis.call('LLEN', KEYS[2]), tonumber(ARGV[3])
if written < place then return -1 end
for i = written - place + 5, #ARGV do redis.call('RPUSH', KEYS[2], ARGV[i]) end
if ARGV[4] ~= '' then redis.call('HSET', KEYS[1], 'end', ARGV[4]) end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 1
"""

# KEYS meta, outputs. Head, fence, end, outputs; the fence is raised unless the stream has ended.
_TAKE = """
local meta = redis.call('HMGET', KEYS[1], 'head', 'fence', 'end')
if not meta[1] then return false end
if not meta[3] then meta[2] = redis.call('HINCRBY', KEYS[1], 'fence', 1) end
return {meta[1], tonumber(meta[2]), meta[3] or '', redis.call('LRANGE', KEYS[2], 0, -1)}
"""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A journal as read."""

    head: bytes
    fence: int
    end: bytes  # empty = the stream goes on
    outputs: list[bytes]


class Journal:
    """One pool of connections to Redis. Every method raises SessionStoreUnavailable where Redis does not answer."""

    def __init__(self, url: str, *, ttl_s: float = 600.0, timeout_s: float = 2.0) -> None:
        self._connection = RedisConnection(url, max_connections=8, timeout_s=timeout_s)
        self._redis: Any = self._connection.client
        self.ttl_s, self._ttl_ms = ttl_s, int(ttl_s * 1000)
        self._waiting: list[tuple[list[str | int | bytes], asyncio.Future[int]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._late: set[asyncio.Task[None]] = set()  # writers of journals that Redis was away for

    async def begin(self, owner: str, request_id: str, head: bytes) -> bool:
        """Before any work. False: this owner has a journal of this name already."""
        arguments = (head, self._ttl_ms, secrets.token_hex(8))
        return bool(await self._connection.eval(_BEGIN, _keys(owner, request_id), arguments))

    async def take(self, owner: str, request_id: str) -> Recorded:
        """Read it and, unless it has ended, become its author."""
        found = await self._connection.eval(_TAKE, _keys(owner, request_id))
        if found is None:
            raise NotFound("resumable request", request_id)
        return Recorded(*found)

    async def head(self, owner: str, request_id: str) -> bytes:
        meta = _keys(owner, request_id)[0]
        found: bytes | None = await self._connection.answered(self._redis.hget(meta, "head"))
        return found or b""

    async def append(
        self, owner: str, request_id: str, fence: int, place: int, outputs: Sequence[bytes], end: bytes = b""
    ) -> bool:
        """Outputs from number `place` on. True once they are written, False where the journal is gone. Unavailable:
        another gateway is the author now."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(([*_keys(owner, request_id), fence, self._ttl_ms, place, end, *outputs], future))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(), name="journal")
        written = await future
        if not written:
            raise Unavailable(f"another gateway goes on with request {request_id!r}; resume it", retry_after_s=0.0)
        return written > 0

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """A task that ends with the journal."""
        task = asyncio.create_task(work, name="late journal")
        self._late.add(task)
        task.add_done_callback(self._late.discard)
        return task

    async def close(self) -> None:
        for task in (*self._late, *([self._writer] if self._writer is not None else [])):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._connection.close()

    async def _write(self) -> None:
        """Whatever waits, in one pipeline; what comes meanwhile goes with the next."""
        while self._waiting:
            batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
            try:
                async with self._redis.pipeline(transaction=False) as pipe:
                    for arguments, _ in batch:
                        pipe.eval(_APPEND, 2, *arguments)
                    answers = await self._connection.answered(pipe.execute(raise_on_error=False))
            except Exception as error:  # every waiter raises it, whatever it is
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception):  # of this stream's node alone
                    future.set_exception(failure(answer))
                else:
                    future.set_result(answer)


class JournalWriter:
    """The author's end of one journal. Where Redis goes away meanwhile the stream goes on, and its outputs wait here;
    when Redis is back the journal is made whole, so that who takes over later replays what the client has seen."""

    __slots__ = ("_end", "_fenced", "_journal", "_key", "_late", "_place", "_unsent", "lost")

    def __init__(self, journal: Journal, owner: str, request_id: str, fence: int, num_outputs: int = 0) -> None:
        """`num_outputs` are in it already."""
        self._journal, self._key = journal, (owner, request_id, fence)
        self._place = num_outputs  # of the first one that is not known to be written
        self._unsent: list[bytes] = []
        self._end = b""  # likewise
        self._late: asyncio.Task[None] | None = None  # brings the journal up to date
        self._fenced: Unavailable | None = None
        self.lost = False  # it expired, or its server lost it: nothing is written any more

    async def append(self, output: bytes, end: bytes = b"") -> None:
        """Returns when it is written, at once while Redis is away. Unavailable: another gateway is the author now."""
        if self._fenced is not None:
            raise self._fenced
        if self.lost:
            return
        if output:
            self._unsent.append(output)
        self._end = end
        if self._late is None and not await self._send():
            _log.warning("request %s is journaled later: the session store is away", self._key[1])
            self._late = self._journal.spawn(self._catch_up())

    async def _send(self) -> bool:
        """Write what waits. False: Redis is away."""
        outputs, end = tuple(self._unsent), self._end
        try:
            self.lost = not await self._journal.append(*self._key, self._place, outputs, end)
        except SessionStoreUnavailable:
            return False
        self._place += len(outputs)
        del self._unsent[: len(outputs)]
        if end:
            self._end = b""
        return True

    async def _catch_up(self) -> None:
        """Until nothing waits; a stream that has ended by then can be read again all the same."""
        try:
            async with asyncio.timeout(self._journal.ttl_s):
                while not self.lost and (self._unsent or self._end):
                    if not await self._send():
                        await asyncio.sleep(RETRY_S)
        except TimeoutError:
            self.lost = True  # it has expired
        except Unavailable as error:
            self._fenced = error
        self._late = None


def _keys(owner: str, request_id: str) -> tuple[str, str]:
    tag = f"{PREFIX}:journal:{{{owner}/{request_id}}}"
    return f"{tag}:meta", f"{tag}:outputs"
