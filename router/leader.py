"""Which step comes next, who takes part and with how many tokens. Pure: bids and reports in, headers out.

Why a leader: attention replicas step together, so that an expert's weights are read once for all of them; a header
named by one place cannot disagree with itself. The leader waits for the bids of the last step's participants for a
short grace (they usually come together), then goes on without: a late member misses the step instead of holding it.
No bid, no step. A failed step ends the epoch: no header is issued until another epoch is installed, because a broken
communicator must not be used again. Idea: vLLM's data-parallel step coordination, with bids instead of dummy
batches."""

from collections.abc import Sequence
from dataclasses import dataclass

from .epoch import WHOLE, Epoch, StepHeader

# Sizes of steps that hold prompts, few, since each is captured for itself: up to 512 as far apart as steps cost the
# same, then an eighth of the largest. Above, a GPU's work hides its launches.
PROMPT_BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1536, 1792, 2048)


@dataclass(frozen=True, slots=True)
class BidPlaced:
    """`after_step` = last step whose header named this member a source, as the bidder knew it: an older one is a bid
    that crossed its own answer on the way and is void. (0, 0) withdraws."""

    member_id: str
    num_decode: int
    num_prefill: int
    after_step: int
    traceparent: str = ""  # W3C context of a request in it; the header carries one of them to the expert owners
    whole: bool = False  # answers did not all fit lately (guard.py): ask for a step in which they do


@dataclass(frozen=True, slots=True)
class StepDone:
    """An attention member has taken all its turns of the step (on a GPU: has them in its stream, and may fail later);
    or any member failed in it."""

    member_id: str
    step_id: int
    failed: bool = False


@dataclass(frozen=True, slots=True)
class EpochInstalled:
    """From here on headers name this epoch. None = stop (another member leads, or this one leaves)."""

    epoch: Epoch | None
    last_step_id: int = 0  # the highest step id that this process has seen


@dataclass(frozen=True, slots=True)
class GraceOver:
    pass


LeaderEvent = BidPlaced | StepDone | EpochInstalled | GraceOver


@dataclass(frozen=True, slots=True)
class IssueHeader:
    header: StepHeader
    recipients: tuple[int, ...]  # ranks: every source, and every owner of experts


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Send `GraceOver` at this time."""

    at: float


LeaderCommand = IssueHeader | WakeAt


class Leader:
    """`step(event, now) -> commands`. Members are known by id, so bids outlive a change of ranks."""

    def __init__(
        self,
        *,
        max_prefill_tokens: int,
        grace_share: float = 0.5,
        min_grace_s: float = 0.002,
        max_grace_s: float = 0.05,
        buckets: Sequence[int] = (),  # sizes of captured steps of decodes; none = prompts have none either
    ) -> None:
        self._max_prefill_tokens, self._buckets = max_prefill_tokens, tuple(sorted(buckets))
        self._prompt_buckets = PROMPT_BUCKETS if buckets else ()
        self._grace_share, self._min_grace_s, self._max_grace_s = grace_share, min_grace_s, max_grace_s
        self._epoch: Epoch | None = None
        self._failed = False  # the epoch in force is broken
        self._bids: dict[str, BidPlaced] = {}
        self._named: dict[str, int] = {}  # member -> last step that named it a source
        self._silent: set[str] = set()  # sources of the last step that have not bid since
        self._running: set[str] = set()  # members that have not finished the step in flight
        self._step_id = 0
        self._issued_at = 0.0
        self._issued_in = 0  # epoch of the last step ...
        self._first_step = 0  # ... and its first one
        self._step_s = 0.0  # duration of the last step, what the grace is a share of
        self._grace_ends: float | None = None

    @property
    def step_in_flight(self) -> bool:
        return bool(self._running)

    def step(self, event: LeaderEvent, now: float) -> list[LeaderCommand]:
        match event:
            case BidPlaced():
                self._take_bid(event)
            case StepDone():
                self._take_done(event, now)
            case EpochInstalled():
                self._install(event)
            case GraceOver():
                pass
        return self._next(now)

    def _take_bid(self, bid: BidPlaced) -> None:
        if bid.after_step < self._named.get(bid.member_id, 0):
            return
        self._silent.discard(bid.member_id)
        if bid.num_decode + bid.num_prefill > 0:
            self._bids[bid.member_id] = bid
        else:
            self._bids.pop(bid.member_id, None)

    def _take_done(self, done: StepDone, now: float) -> None:
        if not self._first_step <= done.step_id <= self._step_id:
            return  # of an epoch before that of the last step
        if done.failed:  # an owner of experts says so too; on a GPU perhaps of a step before the last
            # A step that was issued in the epoch before may fail when this one is in force already: it broke that one.
            self._failed = self._failed or self._epoch is None or self._epoch.number == self._issued_in
            self._running.clear()
        elif done.step_id == self._step_id and self._running:
            self._running.discard(done.member_id)
        else:
            return
        if not self._running:
            self._step_s = now - self._issued_at

    def _install(self, event: EpochInstalled) -> None:
        self._epoch, self._failed = event.epoch, False
        self._step_id = max(self._step_id, event.last_step_id)
        # A leader between, who was new, may have counted from lower: what was named here before would hide all bids
        # after its steps. A late bid at most asks for a step that its member no longer needs.
        self._named.clear()
        members = {m.member_id for m in event.epoch.members} if event.epoch else set()
        self._silent &= members
        if event.epoch is None:
            self._bids.clear()  # members bid again to whoever leads next
        else:
            self._bids = {name: bid for name, bid in self._bids.items() if name in members}
            self._running &= members
        self._grace_ends = None

    def _next(self, now: float) -> list[LeaderCommand]:
        if self._epoch is None or self._failed or self._running or not self._bids:
            return []
        if self._silent:
            if self._grace_ends is None:
                grace_s = min(max(self._grace_share * self._step_s, self._min_grace_s), self._max_grace_s)
                self._grace_ends = now + grace_s
                return [WakeAt(self._grace_ends)]
            if now < self._grace_ends:
                return []
        return [self._issue(self._epoch, now)]

    def _issue(self, epoch: Epoch, now: float) -> IssueHeader:
        self._step_id += 1
        if epoch.number != self._issued_in:
            self._first_step = self._step_id
        self._issued_at, self._issued_in, self._grace_ends = now, epoch.number, None
        num_tokens = self._allocate(epoch)
        named = {epoch.members[rank].member_id for rank, n in enumerate(num_tokens) if n}
        answered = [self._bids.pop(member_id) for member_id in sorted(named)]
        for member_id in named:
            self._named[member_id] = self._step_id
        self._silent = named
        recipients = tuple(r for r, m in enumerate(epoch.members) if m.expert or num_tokens[r])
        self._running = {epoch.members[r].member_id for r in recipients if epoch.members[r].attention}
        buckets = self._prompt_buckets if any(bid.num_prefill for bid in answered) else self._buckets
        header = StepHeader(
            step_id=self._step_id,
            epoch=epoch.number,
            placement_version=epoch.placement_version,
            num_tokens=num_tokens,
            bucket=next((size for size in buckets if size >= max(num_tokens)), 0),
            flags=WHOLE if any(bid.whole for bid in answered) else 0,
            traceparent=next((bid.traceparent for bid in answered if bid.traceparent), ""),
        )
        return IssueHeader(header, recipients)

    def _allocate(self, epoch: Epoch) -> tuple[int, ...]:
        """All decode tokens, and the prefill budget shared evenly; what one bidder leaves goes to the others. The order
        turns with the step, so that no bidder always gets the remainder."""
        bids = {epoch.rank_of(name): bid for name, bid in self._bids.items()}
        order = sorted(bids, key=lambda rank: (bids[rank].num_prefill, (rank + self._step_id) % len(epoch.members)))
        num_tokens = [0] * len(epoch.members)
        left = self._max_prefill_tokens
        for i, rank in enumerate(order):
            share = min(bids[rank].num_prefill, -(-left // (len(order) - i)))
            left -= share
            num_tokens[rank] = bids[rank].num_decode + share
        return tuple(num_tokens)
