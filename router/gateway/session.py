"""The durable record of a conversation in Redis: open, commit with a version check, get, list, delete.

A record is two keys in one hash slot (`{owner/session}`): a hash (version, sizes, affinity) and the list of turns,
which only grows. A turn is committed by one Lua script that compares the version read when the turn began, so of two
writers one commits and the other gets SessionConflict; the same request committed twice (a retry after a lost reply)
counts once. Turns hold text and the generated ids. Both keys expire together, renewed by each commit.

Redis away means SessionStoreUnavailable here and nothing anywhere else: stateless traffic never comes by."""

import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import redis.asyncio as redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from ...errors import InvalidRequest, NotFound, SessionConflict, SessionStoreUnavailable

T = TypeVar("T")
Page = tuple[list["SessionRecord"], str]  # sessions without turns, token of the next page
PREFIX = "expertmesh"
_log = logging.getLogger(__name__)

# KEYS meta, turns; ARGV expected version, request id, turn JSON, now, ttl ms, affinity.
# Returns {1, version} when committed, {0, current version} when another writer was first.
_COMMIT = """
local current = tonumber(redis.call('HGET', KEYS[1], 'version') or '0')
if redis.call('HGET', KEYS[1], 'last_request_id') == ARGV[2] then return {1, current} end
if current ~= tonumber(ARGV[1]) then return {0, current} end
if current == 0 then redis.call('HSET', KEYS[1], 'created_at', ARGV[4]) end
redis.call('RPUSH', KEYS[2], ARGV[3])
redis.call('HSET', KEYS[1], 'last_request_id', ARGV[2], 'affinity', ARGV[6])
redis.call('HINCRBY', KEYS[1], 'num_bytes', #ARGV[3])
local version = redis.call('HINCRBY', KEYS[1], 'version', 1)
redis.call('PEXPIRE', KEYS[1], ARGV[5])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
return {1, version}
"""

# KEYS meta, turns of the new session; ARGV version, now, ttl ms, affinity, last request id, turns...
# 1 = made, 0 = there is one of this name.
_FORK = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local size = 0
for i = 6, #ARGV do
  redis.call('RPUSH', KEYS[2], ARGV[i])
  size = size + #ARGV[i]
end
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'created_at', ARGV[2], 'num_bytes', size,
           'affinity', ARGV[4], 'last_request_id', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return 1
"""

# KEYS index by id, index by expiry (one slot, another than the session's); ARGV session id, now, expires at.
# Puts the session in and takes up to 100 expired ones out, so the index stays as large as what lives.
_INDEX = """
redis.call('ZADD', KEYS[1], 0, ARGV[1])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ARGV[2], 'LIMIT', 0, 100)) do
  redis.call('ZREM', KEYS[1], id)
  redis.call('ZREM', KEYS[2], id)
end
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRecord:
    """One committed exchange: new input messages, the reply, and the reply's ids as they were generated."""

    messages: list[dict[str, Any]]
    output_ids: list[int] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    request_id: str = ""
    finished_at: float = 0.0  # unix seconds
    finish_reason: int = 0
    seed: int = 0
    input_ids: list[int] = field(default_factory=list)  # of the prompt behind `num_spliced` ones, with KEEP_THINKING
    num_spliced: int = 0  # prompt ids that came from earlier turns; 0 = the prompt was rendered whole
    settings: dict[str, Any] = field(default_factory=dict)  # of the session from this turn on


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """A session as read. Version 0 = not there yet: the first commit makes it."""

    session_id: str
    version: int = 0
    turns: tuple[TurnRecord, ...] = ()
    num_bytes: int = 0
    affinity: str = ""  # attention replica that served the last turn
    created_at: float = 0.0  # unix seconds
    expires_at: float = 0.0

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The transcript as the chat template takes it."""
        return [message for turn in self.turns for message in turn.messages]

    @property
    def settings(self) -> dict[str, Any]:
        """`thinking_mode`, `budget_tokens`, `history_policy`, `tools`: those of the last turn."""
        return self.turns[-1].settings if self.turns else {}


class SessionStore:
    """One pool of connections to Redis. Every method raises SessionStoreUnavailable where Redis does not answer."""

    def __init__(
        self,
        url: str,
        *,
        ttl_s: float = 24 * 3600.0,
        max_bytes: int = 4 << 20,
        max_connections: int = 64,
        timeout_s: float = 2.0,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`max_bytes`: a session this large takes no further turn."""
        self._ttl_s, self._max_bytes, self._wall_clock = ttl_s, max_bytes, wall_clock
        self._redis: Any = connect(url, max_connections=max_connections, timeout_s=timeout_s)
        self._commit = self._redis.register_script(_COMMIT)
        self._enter = self._redis.register_script(_INDEX)

    async def open(self, session_id: str, owner: str = "") -> SessionRecord:
        """The record that a new turn begins from, empty where there is none yet."""
        record = await answered(self._read(session_id, owner))
        if record.num_bytes >= self._max_bytes:
            raise InvalidRequest(
                "session_id", session_id, f"a session below {self._max_bytes} bytes, this one has {record.num_bytes}"
            )
        return record

    async def commit(
        self, session_id: str, expected_version: int, turn: TurnRecord, *, owner: str = "", affinity: str = ""
    ) -> int:
        """Append the turn if nobody else did since `expected_version`; the new version."""
        meta, turns = _keys(session_id, owner)
        data = _dump(turn)
        arguments: list[str | int | float] = [
            expected_version,
            turn.request_id,
            data,
            self._wall_clock(),
            int(self._ttl_s * 1000),
            affinity,
        ]
        committed, version = await answered(self._commit(keys=[meta, turns], args=arguments))
        if not committed:
            raise SessionConflict(session_id, expected_version=expected_version, current_version=version)
        now = self._wall_clock()
        try:
            await answered(self._enter(keys=_index(owner), args=[session_id, now, now + self._ttl_s]))
        except SessionStoreUnavailable as error:  # the turn is in; the next one enters the session again
            _log.warning("session %s is not in the index: %s", session_id, error)
        return int(version)

    async def get(self, session_id: str, owner: str = "") -> SessionRecord:
        record = await answered(self._read(session_id, owner))
        if not record.version:
            raise NotFound("session", session_id)
        return record

    async def list(self, owner: str = "", *, page_size: int = 50, page_token: str = "") -> Page:
        """Sessions without turns in the order of their ids, and the token of the next page ("" = no more)."""
        return await answered(self._list(owner, page_size, page_token))

    async def delete(self, session_id: str, owner: str = "") -> None:
        removed = await answered(self._redis.delete(*_keys(session_id, owner)))
        for index in _index(owner):
            await answered(self._redis.zrem(index, session_id))
        if not removed:
            raise NotFound("session", session_id)

    async def fork(
        self, session_id: str, new_session_id: str, owner: str = "", *, at_version: int = 0
    ) -> SessionRecord:
        """Copy the first `at_version` turns (0 = all) into a new session."""
        record = await self.get(session_id, owner)
        version = at_version or record.version
        if version > record.version:
            raise InvalidRequest("at_version", at_version, f"0..{record.version}, the turns of {session_id!r}")
        turns = record.turns[:version]
        now = self._wall_clock()
        made = await answered(
            self._redis.eval(
                _FORK,
                2,
                *_keys(new_session_id, owner),
                version,
                now,
                int(self._ttl_s * 1000),
                record.affinity,
                turns[-1].request_id,
                *(_dump(turn) for turn in turns),
            )
        )
        if not made:
            raise InvalidRequest("new_session_id", new_session_id, "an id that no session has")
        await answered(self._enter(keys=_index(owner), args=[new_session_id, now, now + self._ttl_s]))
        return await self.get(new_session_id, owner)

    async def ping(self) -> None:
        await answered(self._redis.ping())

    async def close(self) -> None:
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def _read(self, session_id: str, owner: str) -> SessionRecord:
        meta, turns = _keys(session_id, owner)
        async with self._redis.pipeline(transaction=True) as pipe:  # one consistent view
            pipe.hgetall(meta).lrange(turns, 0, -1).pttl(meta)
            found, items, ttl_ms = await pipe.execute()
        return self._record(session_id, found, items, ttl_ms)

    async def _list(self, owner: str, page_size: int, page_token: str) -> Page:
        index, start = _index(owner)[0], f"({page_token}" if page_token else "-"
        records: list[SessionRecord] = []
        while len(records) < page_size:
            wanted = page_size - len(records)
            names = [n.decode() for n in await self._redis.zrangebylex(index, start, "+", start=0, num=wanted)]
            if not names:
                return records, ""
            async with self._redis.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.hgetall(_keys(name, owner)[0]).pttl(_keys(name, owner)[0])
                answers = await pipe.execute()
            for name, found, ttl_ms in zip(names, answers[::2], answers[1::2], strict=True):
                if found:
                    records.append(self._record(name, found, [], ttl_ms))
                else:
                    await self._redis.zrem(index, name)  # expired
            start = f"({names[-1]}"
        return records, records[-1].session_id

    def _record(self, session_id: str, found: dict[bytes, bytes], items: Sequence[bytes], ttl_ms: int) -> SessionRecord:
        if not found:
            return SessionRecord(session_id=session_id)
        return SessionRecord(
            session_id=session_id,
            version=int(found[b"version"]),
            turns=tuple(TurnRecord(**json.loads(item)) for item in items),
            num_bytes=int(found.get(b"num_bytes", 0)),
            affinity=found.get(b"affinity", b"").decode(),
            created_at=float(found[b"created_at"]),
            expires_at=self._wall_clock() + max(ttl_ms, 0) / 1000,
        )


def connect(url: str, *, max_connections: int, timeout_s: float) -> Any:
    """A client whose callers wait for a connection rather than fail; nothing is dialled before the first call."""
    pool = redis.BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
    )
    return redis.Redis(connection_pool=pool)


async def answered(call: Awaitable[T]) -> T:
    """The call's answer; whatever goes wrong with Redis is SessionStoreUnavailable."""
    try:
        return await call
    except (RedisConnectionError, OSError, TimeoutError) as error:
        raise SessionStoreUnavailable(f"the session store does not answer ({_short(error)}); try again") from error
    except ResponseError as error:
        raise SessionStoreUnavailable(f"the session store refuses: {_short(error)}", retry_after_s=5.0) from error
    except RedisError as error:
        raise SessionStoreUnavailable(f"the session store failed: {_short(error)}") from error


def _dump(turn: TurnRecord) -> str:
    return json.dumps(asdict(turn), ensure_ascii=False, separators=(",", ":"))


def _keys(session_id: str, owner: str) -> tuple[str, str]:
    """Hash and list of one session; the braces keep them in one slot of a Redis Cluster."""
    tag = f"{PREFIX}:session:{{{owner}/{session_id}}}"
    return f"{tag}:meta", f"{tag}:turns"


def _index(owner: str) -> tuple[str, str]:
    """An owner's sessions by id (for pages) and by expiry."""
    return f"{PREFIX}:sessions:{{{owner}}}", f"{PREFIX}:sessions:{{{owner}}}:expiry"


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]
