"""The durable record of a conversation in Redis: open, commit with a version check, get, list, delete.

A record is two keys in one hash slot (`{owner/session}`): a hash (version, sizes, affinity) and the list of turns,
which only grows. A turn is committed by one Lua script that compares the version read when the turn began, so of two
writers one commits and the other gets SessionConflict; the same request committed twice (a retry after a lost reply)
counts once, however late and whatever came after it. Turns hold text and the generated ids. Both keys expire together,
renewed by each commit.

Redis away means SessionStoreUnavailable here and nothing anywhere else: stateless traffic never comes by."""

import json
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...errors import InvalidRequest, NotFound, SessionConflict, SessionStoreUnavailable
from .redis_connection import RedisConnection

Page = tuple[list["SessionRecord"], str]  # sessions without turns, token of the next page
PREFIX = "expertmesh"
_SUSPECT_KEY = f"{PREFIX}:suspect"
_log = logging.getLogger(__name__)

# KEYS meta, turns; ARGV expected version, request id, turn JSON, now, ttl ms, affinity.
# Returns {1, version} when committed, {0, current version} when another writer was first.
# Where this very turn stands at its place already, it is committed.
_COMMIT = """
local current, expected = tonumber(redis.call('HGET', KEYS[1], 'version') or '0'), tonumber(ARGV[1])
if current > expected then
  local read, turn = pcall(cjson.decode, redis.call('LINDEX', KEYS[2], expected))
  if read and turn.request_id == ARGV[2] then return {1, expected + 1} end
end
if current ~= expected then return {0, current} end
if current == 0 then redis.call('HSET', KEYS[1], 'created_at', ARGV[4]) end
redis.call('RPUSH', KEYS[2], ARGV[3])
redis.call('HSET', KEYS[1], 'affinity', ARGV[6])
redis.call('HINCRBY', KEYS[1], 'num_bytes', #ARGV[3])
local version = redis.call('HINCRBY', KEYS[1], 'version', 1)
redis.call('PEXPIRE', KEYS[1], ARGV[5])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
return {1, version}
"""

# KEYS meta, turns; the hash, its ttl in ms, the turns: one view of them.
_READ = """
return {redis.call('HGETALL', KEYS[1]), redis.call('PTTL', KEYS[1]), redis.call('LRANGE', KEYS[2], 0, -1)}
"""

# KEYS meta; the same without turns.
_READ_META = "return {redis.call('HGETALL', KEYS[1]), redis.call('PTTL', KEYS[1]), {}}"

# KEYS meta, turns of the new session; ARGV version, now, ttl ms, affinity, name of this fork, turns...
# 1 = made (also when run twice), 0 = there is one of this name.
_FORK = """
if redis.call('HGET', KEYS[1], 'fork') == ARGV[5] then return 1 end
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local size = 0
for i = 6, #ARGV do
  redis.call('RPUSH', KEYS[2], ARGV[i])
  size = size + #ARGV[i]
end
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'created_at', ARGV[2], 'num_bytes', size,
           'affinity', ARGV[4], 'fork', ARGV[5])
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


# KEYS times of damage; ARGV now, ttl ms, then from and to of each. A sorted set by their ends; those of turns that have
# expired since are taken out.
_SUSPECT = """
for i = 3, #ARGV, 2 do
  redis.call('ZADD', KEYS[1], ARGV[i + 1], ARGV[i] .. ' ' .. ARGV[i + 1])
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[1] - ARGV[2] / 1000)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

Span = tuple[float, float]  # from, to; unix seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRecord:
    """One committed exchange: new input messages, the reply, and the reply's ids as they were generated."""

    messages: list[dict[str, Any]]
    output_ids: list[int] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    request_id: str = ""
    began_at: float = 0.0  # unix seconds; 0 = not known
    finished_at: float = 0.0
    finish_reason: int = 0
    seed: int = 0
    input_ids: list[int] = field(default_factory=list)  # of the prompt behind `num_spliced` ones, with KEEP_THINKING
    num_spliced: int = 0  # prompt ids that came from earlier turns; 0 = the prompt was rendered whole
    settings: dict[str, Any] = field(default_factory=dict)  # of the session from this turn on

    def ran_in(self, span: Span) -> bool:
        return (self.began_at or self.finished_at) <= span[1] and self.finished_at >= span[0]


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
    suspect_turns: frozenset[int] = frozenset()  # that ran while expert weights were damaged; read by `get` alone

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
        self._connection = RedisConnection(url, max_connections=max_connections, timeout_s=timeout_s)
        self._redis: Any = self._connection.client

    async def open(self, session_id: str, owner: str = "") -> SessionRecord:
        """The record that a new turn begins from, empty where there is none yet."""
        record = await self._read(session_id, owner)
        if record.num_bytes >= self._max_bytes:
            raise InvalidRequest(
                "session_id", session_id, f"a session below {self._max_bytes} bytes, this one has {record.num_bytes}"
            )
        return record

    async def commit(
        self, session_id: str, expected_version: int, turn: TurnRecord, *, owner: str = "", affinity: str = ""
    ) -> int:
        """Append the turn if nobody else did since `expected_version`; the new version."""
        now, ttl_ms = self._wall_clock(), int(self._ttl_s * 1000)
        arguments = (expected_version, turn.request_id, _dump(turn), now, ttl_ms, affinity)
        committed, version = await self._connection.eval(_COMMIT, _keys(session_id, owner), arguments)
        if not committed:
            raise SessionConflict(session_id, expected_version=expected_version, current_version=version)
        try:
            await self._enter(session_id, owner, now)
        except SessionStoreUnavailable as error:  # the turn is in; the next one enters the session again
            _log.warning("session %s is not in the index: %s", session_id, error)
        return int(version)

    async def get(self, session_id: str, owner: str = "") -> SessionRecord:
        record = await self._read(session_id, owner)
        if not record.version:
            raise NotFound("session", session_id)
        spans = await self._suspect_spans()
        found = (i for i, turn in enumerate(record.turns) if any(map(turn.ran_in, spans)))
        return replace(record, suspect_turns=frozenset(found)) if spans else record

    async def mark_suspect(self, spans: Sequence[Span]) -> None:
        """Turns of any session that ran in one of these times are suspect from now on, those in work too."""
        ttl_ms = int(self._ttl_s * 1000)
        times = [repr(moment) for span in spans for moment in span]
        await self._connection.eval(_SUSPECT, (_SUSPECT_KEY,), (self._wall_clock(), ttl_ms, *times))

    async def _suspect_spans(self) -> list[Span]:
        found = await self._connection.answered(self._redis.zrange(_SUSPECT_KEY, 0, -1))
        return [(float(begin), float(end)) for begin, end in (member.split() for member in found)]

    async def list(self, owner: str = "", *, page_size: int = 50, page_token: str = "") -> Page:
        """Sessions without turns in the order of their ids, and the token of the next page ("" = no more)."""
        return await self._connection.answered(self._list(owner, page_size, page_token))

    async def delete(self, session_id: str, owner: str = "") -> None:
        removed = await self._connection.answered(self._redis.delete(*_keys(session_id, owner)))
        for index in _index(owner):
            await self._connection.answered(self._redis.zrem(index, session_id))
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
        now, ttl_ms = self._wall_clock(), int(self._ttl_s * 1000)
        arguments = (version, now, ttl_ms, record.affinity, secrets.token_hex(8), *map(_dump, turns))
        made = await self._connection.eval(_FORK, _keys(new_session_id, owner), arguments)
        if not made:
            raise InvalidRequest("new_session_id", new_session_id, "an id that no session has")
        await self._enter(new_session_id, owner, now)
        return await self.get(new_session_id, owner)

    async def ping(self) -> None:
        await self._connection.answered(self._redis.ping())

    async def check(self) -> None:
        """ConfigError where the store will never serve us; one that is away is only noted."""
        await self._connection.check()

    async def close(self) -> None:
        await self._connection.close()

    async def _enter(self, session_id: str, owner: str, now: float) -> None:
        await self._connection.eval(_INDEX, _index(owner), (session_id, now, now + self._ttl_s))

    async def _read(self, session_id: str, owner: str) -> SessionRecord:
        return self._record(session_id, *await self._connection.eval(_READ, _keys(session_id, owner)))

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
                    pipe.eval(_READ_META, 1, _keys(name, owner)[0])
                answers = await pipe.execute()
            for name, answer in zip(names, answers, strict=True):
                if answer[0]:
                    records.append(self._record(name, *answer))
                else:
                    await self._redis.zrem(index, name)  # expired
            start = f"({names[-1]}"
        return records, records[-1].session_id

    def _record(self, session_id: str, pairs: Sequence[bytes], ttl_ms: int, items: Sequence[bytes]) -> SessionRecord:
        """`pairs`: names and values of the hash in turn, as a script gives them."""
        if not pairs:
            return SessionRecord(session_id=session_id)
        found = dict(zip(pairs[::2], pairs[1::2], strict=True))
        return SessionRecord(
            session_id=session_id,
            version=int(found[b"version"]),
            turns=tuple(TurnRecord(**json.loads(item)) for item in items),
            num_bytes=int(found.get(b"num_bytes", 0)),
            affinity=found.get(b"affinity", b"").decode(),
            created_at=float(found[b"created_at"]),
            expires_at=self._wall_clock() + max(ttl_ms, 0) / 1000,
        )


def _dump(turn: TurnRecord) -> str:
    return json.dumps(asdict(turn), ensure_ascii=False, separators=(",", ":"))


def _keys(session_id: str, owner: str) -> tuple[str, str]:
    """Hash and list of one session; the braces keep them in one slot of a Redis Cluster."""
    tag = f"{PREFIX}:session:{{{owner}/{session_id}}}"
    return f"{tag}:meta", f"{tag}:turns"


def _index(owner: str) -> tuple[str, str]:
    """An owner's sessions by id (for pages) and by expiry: one slot, whoever the owner is."""
    tag = f"{PREFIX}:sessions:{{{owner}/}}"
    return tag, f"{tag}:expiry"
