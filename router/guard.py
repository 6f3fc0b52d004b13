"""What is checked about every exchanged row, and what follows from a bad one.

**Checksum.** A row is read as 32-bit words w_i; its checksum is the sum of w_i * m_i mod 2^64 with fixed odd 64-bit
multipliers m_i. Damage d_i = w'_i - w_i has |d_i| < 2^32. Damage within one word is always seen: m odd and
0 < |d| < 2^32 give d * m != 0 mod 2^64. Damage in several words is missed only if sum d_i * m_i = 0 mod 2^64; let 2^t
be the largest power of two that divides all d_i: t <= 31, and for random multipliers that has probability
2^(t - 64) <= 2^-33. Idea: multiply-shift hashing of vectors (Dietzfelbinger; Lemire and Kaser). Why not a CRC: a call a
row, and half the speed here. Against bits that fall over, not against an enemy: the multipliers are public.

**What follows.** `Guard` counts, in one process, the rows of its own tokens. A bad row makes the step run again, with
other copies of the experts where there are some. Rows that arrive damaged are never accepted. A row that is not finite
but arrived as it was sent is tried `max_replays` times and then let through: it is the model's or the request's own,
and ends that request alone. A shard with `max_bad_rows` bad rows within `window_s` is reported, once a window. If the
bad rows of this process are not mostly one shard's, the trouble is this process or its link: nobody is reported.

**Answers without a place** (exchange_nccl.py, bounded form) are nobody's fault: the step runs again, and it and some
steps after it, twice as many each time, are asked to be whole (`epoch.WHOLE`)."""

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from time import monotonic

import numpy as np
import numpy.typing as npt
import torch

from ..errors import GuardError

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_log = logging.getLogger(__name__)
_WHOLE_STEPS = 16, 4096  # at first, at most: after answers without a place


def _multipliers(count: int) -> Int64Array:
    """The first `count` odd multipliers: splitmix64 of the index, so that any prefix is the same."""
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) | np.uint64(1)).view(np.int64)


_known = _multipliers(1 << 14)


def multipliers(count: int) -> Int64Array:
    """[count] odd int64, the same in every process."""
    global _known  # grows, never changes
    if len(_known) < count:
        _known = _multipliers(2 * count)
    return _known[:count]


def checksums(words: Int32Array) -> Int64Array:
    """[n, w] int32 words -> [n] int64, see above."""
    sums: Int64Array = np.einsum("nw,w->n", words, multipliers(words.shape[1]))
    return sums


def row_checksums(rows: torch.Tensor) -> Int64Array:
    """[n, hidden], contiguous, of whole 32-bit words a row -> [n] int64."""
    return checksums(rows.view(torch.int32).numpy())


def all_finite(rows: torch.Tensor) -> bool:
    """One sum, which NaN and infinities survive; looked at closely only where the sum is not finite."""
    total = float(rows.sum(dtype=torch.float32))
    return total - total == 0.0 or bool(torch.isfinite(rows).all())


def non_finite_rows(rows: torch.Tensor) -> list[int]:
    """Indices of the rows [n, hidden] that hold a NaN or an infinity."""
    found: list[int] = (~torch.isfinite(rows).all(dim=1)).nonzero().flatten().tolist()
    return found


class Fault(Enum):
    DAMAGED = "damaged"  # not the bytes that were sent
    HEAD = "head damaged"  # counts, slot ids or checksums of a whole message
    NOT_FINITE = "not finite"  # as sent, but NaN or infinite


class Direction(Enum):
    DISPATCH = "dispatch"  # source -> shard
    RETURN = "return"  # shard -> source


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """One bad row, or a message whose head is bad. `row` counts the rows of this (source, shard, layer) in plan order,
    pairs on the way back; -1 = all of the message."""

    fault: Fault
    direction: Direction
    source: int  # communicator rank whose token it is
    ep_rank: int
    layer_id: int
    row: int = -1
    experts: tuple[int, ...] = ()  # logical experts that it is for, where known
    shard: str = ""  # member id

    def __str__(self) -> str:
        what = f"row {self.row}" if self.row >= 0 else "a message"
        sender, receiver = f"rank {self.source}", f"shard {self.shard or self.ep_rank} (ep_rank {self.ep_rank})"
        if self.direction is Direction.RETURN:
            sender, receiver = receiver, sender
        experts = f", expert {', '.join(map(str, self.experts))}" if self.experts else ""
        return f"{what} from {sender} to {receiver}, layer {self.layer_id}{experts}: {self.fault.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardPolicy:
    max_replays: int = 2  # of one step, for rows that are not finite though they arrived as they were sent
    max_bad_rows: int = 3  # of one shard ...
    window_s: float = 60.0  # ... within this time: it is reported
    main_share: float = 0.75  # of all bad rows in the window, that a shard must have to be the suspect


OnSuspect = Callable[[str, str], None]  # (member id of the shard, why)


class Guard:
    """The bad rows of one process's tokens. Used by its engine thread; the counters may be read by any."""

    def __init__(
        self,
        policy: GuardPolicy | None = None,
        *,
        on_suspect: OnSuspect | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.policy = policy or GuardPolicy()
        self.num_bad_rows = 0  # since start, those that this process received for others included
        self.num_replays = 0
        self.attempt = 0  # how often the present step was run in vain; shifts the choice among copies
        # Called where own experts turn finite rows into others: checks a layer's weights, True where it repaired some.
        self.heal: Callable[[int], bool] = lambda layer_id: False
        self.last = ""  # the newest bad row, for people
        self.num_overflows = 0  # steps with answers that had no place
        self._num_whole = 0  # steps that are still to be whole
        self._on_suspect, self._clock = on_suspect, clock
        self._recent: deque[tuple[float, str]] = deque()  # (when, member id)
        self._reported: dict[str, float] = {}
        self._undecided: list[BadRow] = []  # not finite; the next run of the step says whose fault it was

    @property
    def summary(self) -> str:
        """For a status line; "" = nothing happened."""
        return f"{self.num_bad_rows} bad rows, the last: {self.last}" if self.num_bad_rows else ""

    @property
    def accepts_non_finite(self) -> bool:
        return self.attempt >= self.policy.max_replays

    def seen(self, bad: Sequence[BadRow]) -> None:
        """Bad rows of other processes' tokens, seen here: their sources act on them."""
        for row in bad:
            self.num_bad_rows += 1
            self.last = str(row)
            if self.num_bad_rows <= 20 or self.num_bad_rows % 100 == 0:  # a broken wire must not fill a disk
                _log.warning("bad row %d: %s", self.num_bad_rows, row)

    def failed(self, bad: Sequence[BadRow], *, step_id: int, epoch: int) -> GuardError:
        """The step of this process is void. Returns the error that makes it run again."""
        self.seen(bad)
        self.num_replays += 1
        damaged = [row for row in bad if row.fault is not Fault.NOT_FINITE]
        self.attempt += 1
        self._undecided += [row for row in bad if row.fault is Fault.NOT_FINITE]
        self._count(damaged)
        first = bad[0]
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        return GuardError(
            f"{first}{more}; the step is run again",
            bad=tuple(bad),
            ep_rank=first.ep_rank,
            layer_id=first.layer_id,
            step_id=step_id,
            epoch=epoch,
        )

    @property
    def wants_whole(self) -> bool:
        return self._num_whole > 0

    def overflowed(self, *, layer_id: int, step_id: int, epoch: int) -> GuardError:
        """Answers of this layer had no place: the step of this process is void. Returns what makes it run again."""
        first, most = _WHOLE_STEPS
        self._num_whole = min(first << min(self.num_overflows, 16), most)
        self.num_overflows += 1
        self.num_replays += 1
        message = f"more answers than places in layer {layer_id}"
        _log.warning("%s of step %d; this and the next %d steps are whole", message, step_id, self._num_whole)
        again = f"{message}; the step is run again with a place for each"
        return GuardError(again, bad=(), ep_rank=-1, layer_id=layer_id, step_id=step_id, epoch=epoch)

    def passed(self) -> None:
        """The step went through. Rows that were not finite before and are now were their sender's fault."""
        self._num_whole = max(0, self._num_whole - 1)
        if self.attempt:
            undecided, self._undecided = self._undecided, []
            if not self.accepts_non_finite:
                self._count([row for row in undecided if row.direction is Direction.RETURN])
            self.attempt = 0

    def _count(self, bad: Sequence[BadRow]) -> None:
        now = self._clock()
        while self._recent and self._recent[0][0] < now - self.policy.window_s:
            self._recent.popleft()
        self._recent.extend((now, row.shard) for row in bad)
        by_shard = Counter(shard for _, shard in self._recent)
        for shard in {row.shard for row in bad}:
            count = by_shard[shard]
            if count < self.policy.max_bad_rows or self._reported.get(shard, -1e9) > now - self.policy.window_s:
                continue
            if count < self.policy.main_share * len(self._recent):
                _log.error("bad rows to or from %d shards: this process or its link is suspect", len(by_shard))
                continue
            self._reported[shard] = now
            why = f"{count} bad rows within {self.policy.window_s:.0f} s, the last: {bad[-1]}"
            _log.error("shard %s is suspect: %s", shard, why)
            if self._on_suspect is not None:
                self._on_suspect(shard, why)
