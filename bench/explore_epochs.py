"""Every interleaving of a small cluster's epochs: joins, leaves, deaths, late messages, passing deadlines.

    python -P -m expertmesh.bench.explore_epochs [--depth 9] [--seconds 60] [--only leave]

From a serving epoch, and from a start, everything that may happen next does (`epoch_world.py`): a command is performed,
a report arrives (late ones of the dead too), a preparation ends or fails, a step is issued and ends, a deadline passes,
a step takes long, a link is cut, a member joins, leaves, dies with closed sockets or in silence, is suspected, the
Conductor restarts. Breadth first over distinct states, within a budget of faults for each scenario; then random walks
far from there.

What must hold. **In every step** all members that it names work by the same record (members, placement), and every row
of every source is computed once, by a member that holds its expert. **A commit** finds its epoch prepared. **From every
state**, faults aside, the cluster comes to serve again, with all living members, as long as one attention member and a
copy of each expert live: checked by letting everything that is pending happen, oldest first and newest first. A
violation is shown with the events that lead to it, shortest first. Exits 1 then; the last line is JSON."""

import argparse
import contextlib
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..cluster.membership import Membership
from .epoch_settling import is_serving, settle
from .epoch_world import (
    ROLES,
    Budget,
    Identity,
    Move,
    Node,
    Violation,
    World,
    describe,
    describe_move,
    make,
    moves,
    new_core,
)

SCENARIOS = {
    "death": Budget(crash=1, step=1, tick=1),
    "silent death": Budget(silent=1, step=1, tick=2),
    "hang in a long step": Budget(silent=1, step=1, tick=2, doubt=1),
    "two deaths": Budget(crash=2, tick=1),
    "death and silence": Budget(crash=1, silent=1, step=1, tick=2),
    "cut link": Budget(cut=1, step=2, tick=1),
    "cut link and death": Budget(cut=1, crash=1, step=1),
    "leave": Budget(leave=1, step=1, tick=1),
    "leave and death": Budget(leave=1, crash=1, tick=1),
    "suspect": Budget(suspect=1, crash=1, step=1),
    "join": Budget(join=1, crash=1, step=1, tick=1),
    "restart": Budget(restart=1, step=1, tick=1),
    "restart and death": Budget(restart=1, crash=1, tick=1),
    "start": Budget(join=6, crash=1),
}


@dataclass(slots=True)
class Explored:
    scenario: str
    depth: int = 0  # all states up to here were seen
    num_states: int = 0
    num_moves: int = 0
    num_settled: int = 0
    seconds: float = 0.0
    violation: str = ""

    def ended(self, num_states: int, began: float) -> "Explored":
        self.num_states, self.seconds = num_states, round(time.monotonic() - began, 1)
        return self


def beginning(scenario: str) -> World:
    """Nobody has started, or all but one newcomer serve in epoch 1."""
    budget = SCENARIOS[scenario]
    absent = set(ROLES) if budget.join == len(ROLES) else {"e3"} if budget.join else set()
    world = World(Membership.__new__(Membership), {}, Budget())
    world.nodes = {name: Node(started=name not in absent) for name in ROLES}
    world.core = new_core(world._key)
    world.core._num_attention = 3 - sum(ROLES[n] == "a" for n in absent) or 1
    world.core._num_expert = 3 - sum(ROLES[n] == "e" for n in absent) or 1
    while pending := list(moves(world)):
        make(world, pending[0])
    if len(absent) < len(ROLES):
        assert is_serving(world), describe(world)
    world.budget = budget
    return world


def explore(scenario: str, *, depth: int, seconds: float = 1e9, settle_every: int = 1) -> Explored:
    """Breadth first; from every `settle_every`-th state, in the order found, the cluster must come to serve."""
    found, began = Explored(scenario), time.monotonic()
    first = beginning(scenario)
    origin = first.identity
    parents: dict[Identity, tuple[Identity, Move] | None] = {origin: None}
    level = [(first, origin)]
    while level and found.depth < depth:
        following: list[tuple[World, Identity]] = []
        for world, identity in level:
            for move in moves(world):
                if time.monotonic() - began > seconds:
                    return found.ended(len(parents), began)
                found.num_moves += 1
                after = world.copy()
                try:
                    make(after, move)
                    reached = after.identity
                    if reached in parents:
                        continue
                    parents[reached] = identity, move
                    if len(parents) % settle_every == 0:
                        found.num_settled += 1
                        settle(after, newest_first=False)
                        settle(after, newest_first=True)
                except (Violation, AssertionError, KeyError, StopIteration) as error:
                    found.violation = told(scenario, [*path_to(identity, parents), move], error)
                    return found.ended(len(parents), began)
                following.append((after, reached))
        found.depth += 1
        level = following
    return found.ended(len(parents), began)


def walk(scenario: str, *, num_walks: int, length: int, seed: int = 0) -> Explored:
    """Far from the beginning: random events, then it must come to serve."""
    found, began, generator = Explored(scenario, depth=length), time.monotonic(), random.Random(seed)
    first = beginning(scenario)
    seen: set[Identity] = set()
    for _ in range(num_walks):
        world, path = first.copy(), list[Move]()
        try:
            for _ in range(generator.randrange(length)):
                possible = list(moves(world))
                if not possible:
                    break
                path.append(generator.choice(possible))
                make(world, path[-1])
                seen.add(world.identity)
            found.num_moves += len(path)
            found.num_settled += 1
            settle(world, newest_first=generator.random() < 0.5)
        except (Violation, AssertionError, KeyError, StopIteration) as error:
            found.violation = told(scenario, path, error)
            break
    return found.ended(len(seen), began)


def path_to(identity: Identity, parents: dict[Identity, tuple[Identity, Move] | None]) -> list[Move]:
    path: list[Move] = []
    while (step := parents[identity]) is not None:
        identity, move = step
        path.append(move)
    return path[::-1]


def told(scenario: str, path: Sequence[Move], error: Exception) -> str:
    """The path in words, and what was wrong at its end."""
    world, lines = beginning(scenario), list[str]()
    for move in path:
        lines.append(describe_move(world, move))
        with contextlib.suppress(Exception):
            make(world, move)
    return "\n".join([*lines, f"=> {type(error).__name__}: {error}"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -P -m expertmesh.bench.explore_epochs", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--depth", type=int, default=9, help="events from the beginning (default 9)")
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, for each scenario (default 60)")
    parser.add_argument("--settle-every", type=int, default=20, help="progress from every n-th state (default 20)")
    parser.add_argument("--walks", type=int, default=2000, help="random walks of each scenario (default 2000)")
    parser.add_argument("--length", type=int, default=120, help="events of a walk, at most (default 120)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    arguments = parser.parse_args(argv)
    results = []
    for scenario in [name for name in SCENARIOS if arguments.only in name]:
        every, seconds = arguments.settle_every, arguments.seconds
        for how, found in (
            ("all to depth", explore(scenario, depth=arguments.depth, seconds=seconds, settle_every=every)),
            ("walks up to", walk(scenario, num_walks=arguments.walks, length=arguments.length, seed=arguments.seed)),
        ):
            results.append(found)
            print(
                f"{scenario:18} {how} {found.depth}: {found.num_states} states, {found.num_moves} events, "
                f"progress from {found.num_settled}, {found.seconds} s\n{found.violation}".strip(),
                flush=True,
            )
    ok = bool(results) and not any(r.violation for r in results)
    print(
        json.dumps({"ok": ok, "states": sum(r.num_states for r in results), "scenarios": [asdict(r) for r in results]})
    )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
