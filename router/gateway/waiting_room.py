"""Requests for which the tier has no room yet: they wait here in a fair order (`fair_queue.py`), bounded, until it has.

Why at the gateway: a replica's own queue is first come, first served, so it is kept short; who waits here can be
passed, may leave without a trace, and is refused early with an honest delay. Each gateway is fair by itself."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...errors import QueueFull
from ...request import EngineRequest
from .fair_queue import FairQueue
from .link import RequestStream

OUTPUT_GUESS = 256  # tokens that a request is charged for in advance, unless it may give fewer
RETRY_S = (0.5, 30.0)  # least and most that is told to those who are shed


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingRoomConfig:
    max_waiting: int = 4096
    max_waiting_per_key: int = 1024


@dataclass(eq=False, slots=True)
class Ticket:
    """One request that waits. `admitted`: its stream, or None where it left first."""

    key: str
    request: EngineRequest
    affinity: str
    admitted: asyncio.Future[RequestStream | None]


class WaitingRoom:
    """`enter` and `leave` by streams; `let_in` by the tier whenever there may be room."""

    def __init__(self, config: WaitingRoomConfig, weights: Mapping[str, float], clock: Callable[[], float]) -> None:
        self._config, self._clock = config, clock
        self._queue: FairQueue[Ticket] = FairQueue(weights)
        self._interval_s = 0.0  # between two that were let in, smoothed
        self._last_at = 0.0

    def __len__(self) -> int:
        return len(self._queue)

    def enter(self, key: str, request: EngineRequest, affinity: str) -> Ticket:
        """QueueFull: too many wait, of this key or in all."""
        num_own, num_all = self._queue.num_waiting(key), len(self._queue)
        if num_own >= self._config.max_waiting_per_key or num_all >= self._config.max_waiting:
            delay_s = min(max(num_all * self._interval_s, RETRY_S[0]), RETRY_S[1])
            raise QueueFull(
                f"{num_own} requests of this API key wait here ({self._config.max_waiting_per_key} may), {num_all} in "
                f"all ({self._config.max_waiting} may); try again in {delay_s:.1f} s",
                retry_after_s=delay_s,
            )
        if not num_all:
            self._last_at = self._clock()
        ticket = Ticket(key, request, affinity, asyncio.get_running_loop().create_future())
        self._queue.push(key, cost_of(request), ticket)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Its client has gone. One that was let in just now has a stream that nobody will read: it is aborted."""
        if not ticket.admitted.done():
            self._queue.remove(ticket.key, ticket)
            ticket.admitted.set_result(None)
        elif (stream := ticket.admitted.result()) is not None:
            stream.abort()

    def let_in(self, place: Callable[[Ticket], RequestStream]) -> None:
        """The next one; there is one, and room for it."""
        ticket = self._queue.pop()
        now = self._clock()
        self._interval_s += 0.1 * (now - self._last_at - self._interval_s)
        self._last_at = now
        ticket.admitted.set_result(place(ticket))

    def charge(self, key: str, request: EngineRequest, num_tokens: int) -> None:
        """A request of this key ended with so many tokens."""
        if self._queue:
            self._queue.charge(key, num_tokens - output_guess(request))


def cost_of(request: EngineRequest) -> float:
    """Tokens, as far as they are known. A prefix that will be found in the cache is not."""
    return float(len(request.prompt_ids) + output_guess(request))


def output_guess(request: EngineRequest) -> int:
    return min(request.sampling.max_tokens, OUTPUT_GUESS)
