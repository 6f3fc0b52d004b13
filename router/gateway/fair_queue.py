"""Whose request is next when the tier is full: a queue per key, served in turns, each turn worth as many tokens.

Deficit round robin (Shreedhar and Varghese, SIGCOMM 1995) over tokens: a key whose turn comes gets QUANTUM tokens times
its weight and lets in what they pay for. So backlogged keys get tokens by their weights, however large or many their
requests are; a key's first request waits for one turn of each other key, and new keys, which queue up behind, cannot
starve an old one. Within a key, first come, first served.

What a request costs is known only at its end: it is paid by an estimate when it is let in, and `charge` corrects it
(the counters of "Fairness in Serving Large Language Models", OSDI 2024, do the same). Pure: no clock, no loop."""

import math
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

QUANTUM = 512.0  # tokens
Item = TypeVar("Item")


@dataclass(slots=True)
class _Line(Generic[Item]):
    """One key. Without anybody waiting it is kept only for its debt."""

    quantum: float  # tokens a turn
    credit: float = 0.0  # tokens; below 0 it has had more than was known
    waiting: deque[tuple[float, Item]] = field(default_factory=deque)  # cost, request


class FairQueue(Generic[Item]):
    """`push`, `pop`, `remove`. `weights`: key -> share, 1 where there is none."""

    def __init__(self, weights: Mapping[str, float] | None = None, *, quantum: float = QUANTUM) -> None:
        self._weights, self._quantum = dict(weights or {}), quantum
        self._lines: dict[str, _Line[Item]] = {}
        self._turns: OrderedDict[str, _Line[Item]] = OrderedDict()  # with somebody waiting; the first has the turn
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def num_waiting(self, key: str) -> int:
        line = self._turns.get(key)
        return len(line.waiting) if line else 0

    def push(self, key: str, cost: float, item: Item) -> None:
        """`cost` in tokens, above 0."""
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(self._quantum * self._weights.get(key, 1.0))
        if key not in self._turns:
            if not self._turns:
                line.credit += line.quantum  # its turn begins
            self._turns[key] = line
        line.waiting.append((cost, item))
        self._num_waiting += 1

    def pop(self) -> Item:
        """The next one to let in; IndexError: nobody waits."""
        if not self._turns:
            raise IndexError("nobody waits")
        num_passed = 0
        while True:
            key, line = next(iter(self._turns.items()))
            cost, item = line.waiting[0]
            if line.credit >= cost:
                line.credit -= cost
                line.waiting.popleft()
                self._left(key, line)
                return item
            if num_passed == len(self._turns):
                self._skip_rounds()
                num_passed = 0
            num_passed += 1
            self._next_turn()

    def remove(self, key: str, item: Item) -> bool:
        """It waits no more (its client left); False: it did not wait."""
        line = self._turns.get(key)
        if line is None:
            return False
        for i, (_, waiting) in enumerate(line.waiting):
            if waiting is item:
                del line.waiting[i]
                self._left(key, line)
                return True
        return False

    def charge(self, key: str, tokens: float) -> None:
        """Correct what `key` paid: its request took so many tokens more (below 0: fewer) than estimated."""
        line = self._lines.get(key)
        if line is not None:
            line.credit = min(line.credit - tokens, max(line.credit, line.quantum))

    def _next_turn(self) -> None:
        self._turns.move_to_end(next(iter(self._turns)))
        line = next(iter(self._turns.values()))
        line.credit += line.quantum

    def _skip_rounds(self) -> None:
        """Nobody can pay yet: all turns that nobody can use at once."""
        lines = self._turns.values()
        rounds = min(math.ceil((line.waiting[0][0] - line.credit) / line.quantum) for line in lines) - 1
        for line in lines if rounds > 0 else ():
            line.credit += rounds * line.quantum

    def _left(self, key: str, line: _Line[Item]) -> None:
        self._num_waiting -= 1
        if line.waiting:
            return
        had_turn = next(iter(self._turns)) == key
        del self._turns[key]
        line.credit = min(line.credit, 0.0)  # nothing is saved up
        if not self._turns:  # nobody competes: nobody owes anything
            self._lines.clear()
            return
        if had_turn:
            first = next(iter(self._turns.values()))
            first.credit += first.quantum
        if not line.credit or len(self._lines) > 2 * len(self._turns) + 1024:
            del self._lines[key]
