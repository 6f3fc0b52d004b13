"""Turns that ended while the session store was away: kept in memory, bounded, committed when it answers again.

A turn's client was told `committed=false`. Until its turn is in, a session takes no new one here, and past the bound no
session does: better a clear refusal before the work than a turn that is lost after it. While the store is silent one
turn asks for all; once one is in, the others follow together."""

import asyncio
import contextlib
import itertools
import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

from ...errors import InvalidRequest, SessionConflict, SessionStoreUnavailable
from .session import TurnRecord

MAX_IDS = 4 << 20  # output and input ids kept, over all turns
MAX_TURNS = 1024
RETRY_S = (0.2, 2.0)  # pause between attempts: first, longest
BATCH = 32  # commits at once when the store answers
_log = logging.getLogger(__name__)


class Committer(Protocol):
    async def commit(
        self, session_id: str, expected_version: int, turn: TurnRecord, *, owner: str = "", affinity: str = ""
    ) -> int: ...


@dataclass(frozen=True, slots=True)
class PendingCommit:
    session_id: str
    expected_version: int
    turn: TurnRecord
    owner: str
    affinity: str

    @property
    def size(self) -> int:
        """In ids; text has at most a few bytes for each."""
        return len(self.turn.output_ids) + len(self.turn.input_ids) + 1


class PendingCommits:
    """`add` what could not be committed; a task commits it."""

    def __init__(self, store: Committer, *, max_turns: int = MAX_TURNS, max_ids: int = MAX_IDS) -> None:
        self._store, self._max_turns, self._max_ids = store, max_turns, max_ids
        self._waiting: OrderedDict[int, PendingCommit] = OrderedDict()  # in the order of being tried
        self._numbers = itertools.count()
        self._num_ids = 0
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, commit: PendingCommit) -> None:
        self._waiting[next(self._numbers)] = commit
        self._num_ids += commit.size
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="pending commits")

    def check(self, session_id: str, owner: str) -> None:
        """Whether a turn of this session may begin."""
        if len(self._waiting) >= self._max_turns or self._num_ids >= self._max_ids:
            raise SessionStoreUnavailable(
                f"{len(self._waiting)} turns wait for the session store, which is as many as are kept; try again later",
                retry_after_s=RETRY_S[1],
            )
        if any(c.session_id == session_id and c.owner == owner for c in self._waiting.values()):
            raise SessionStoreUnavailable(
                f"the last turn of session {session_id!r} waits for the session store; try again",
                retry_after_s=RETRY_S[0],
            )

    async def close(self, grace_s: float = 5.0) -> None:
        """A last try for what waits."""
        if self._task is None or self._task.done():
            return
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(self._task, grace_s)
        for commit in self._waiting.values():
            _log.error("turn %s of session %s is lost", commit.turn.request_id, commit.session_id)

    async def _run(self) -> None:
        pause_s, batch_size = RETRY_S[0], 1
        while self._waiting:
            batch = list(itertools.islice(self._waiting.items(), batch_size))
            settled = await asyncio.gather(*(self._settled(commit) for _, commit in batch))
            for (number, commit), is_settled in zip(batch, settled, strict=True):
                if is_settled:
                    del self._waiting[number]
                    self._num_ids -= commit.size
                else:
                    self._waiting.move_to_end(number)  # on a Cluster another one's node may be there
            if any(settled):
                pause_s, batch_size = RETRY_S[0], BATCH
            else:
                await asyncio.sleep(pause_s)
                pause_s, batch_size = min(2 * pause_s, RETRY_S[1]), 1

    async def _settled(self, commit: PendingCommit) -> bool:
        """Whether it is in, or never will be."""
        try:
            await self._store.commit(
                commit.session_id, commit.expected_version, commit.turn, owner=commit.owner, affinity=commit.affinity
            )
        except SessionStoreUnavailable:
            return False
        except (SessionConflict, InvalidRequest) as error:
            _log.error("turn %s cannot be committed any more: %s", commit.turn.request_id, error)
        return True
