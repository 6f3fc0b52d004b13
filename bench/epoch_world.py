"""A small cluster as one value: the real membership core, and members as `mesh.py` and `member_agent.py` make them.

3 attention members and 3 shards, two copies of every expert; mail in both directions, communicators, steps, deadlines
and faults. `moves` lists everything that may happen next, `make` lets one thing happen; `epoch_settling.py` lets all
that is pending happen, `explore_epochs.py` goes through the orders.

The members have no threads: a preparation ends when all its members are at it, commands are taken in order, reports
leave in order, a leader's commit waits for its step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

from ..cluster.membership import Membership, _Transition
from ..cluster.membership_messages import (
    Alive,
    Command,
    Commit,
    Committed,
    Doubt,
    Event,
    Join,
    Leave,
    Lost,
    Prepare,
    Prepared,
    PrepareFailed,
    Probe,
    Retire,
    Rollback,
    Suspect,
    Tick,
    Trouble,
)
from ..router.epoch import Epoch, Member
from ..router.placement import Placement, uniform

Identity = tuple[object, ...]
NUM_LAYERS, NUM_EXPERTS = 1, 3
ROLES = {**{f"a{i}": "a" for i in (1, 2, 3)}, **{f"e{i}": "e" for i in (1, 2, 3)}}
MEMBERS = {
    name: Member(member_id=name, attention=role == "a", expert=role == "e", store_port=7)
    for name, role in ROLES.items()
}


class Violation(Exception):
    """What must never be."""


# ---------------------------------------------------------------- the state


@dataclass(frozen=True, slots=True)
class Node:
    """One process: `mesh.py`'s epochs and `member_agent.py`'s mail. Epochs are numbers into `World.records`."""

    started: bool = True
    alive: bool = True
    leaving: bool = False
    retired: bool = False
    prepared: frozenset[int] = frozenset()  # record ids that it could enter
    preparing: tuple[int, ...] = ()
    dropped: frozenset[int] = frozenset()  # epoch numbers rolled back while they were being prepared
    committed: int = -1  # record id, -1 none
    current: int = -1  # entered
    highest: int = 0
    leads: bool = False
    failed: bool = False  # the epoch that it leads is broken: no header until the next
    in_step: int = -1  # record of the step that it issued and that is not over
    inbox: tuple[Command, ...] = ()
    outbox: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True)
class Budget:
    """How often each may still happen."""

    crash: int = 0
    silent: int = 0  # crash without closed sockets
    cut: int = 0  # a connection of the communicator in force
    leave: int = 0
    join: int = 0
    suspect: int = 0
    restart: int = 0
    tick: int = 0
    step: int = 0
    doubt: int = 0  # of a step that takes long


class World:
    """`core` with everybody around it; copied for every event."""

    records: ClassVar[list[Epoch]] = []  # interned: equal epochs have one id
    record_ids: ClassVar[dict[tuple[object, ...], int]] = {}

    def __init__(self, core: Membership, nodes: dict[str, Node], budget: Budget) -> None:
        self.core, self.nodes, self.budget = core, nodes, budget
        self.now = 0.0
        self.known: frozenset[str] = frozenset()  # joined this Conductor
        self.broken: frozenset[str] = frozenset()  # keys of communicators that were aborted
        self.life = 0  # of the Conductor

    def copy(self) -> "World":
        other = World(copy_core(self.core), dict(self.nodes), self.budget)
        other.now, other.known, other.broken, other.life = self.now, self.known, self.broken, self.life
        other.core._make_key = other._key
        return other

    def _key(self) -> str:
        return f"key{self.life}.{self.core._highest}"

    @property
    def identity(self) -> Identity:
        """Equal for states that behave equally; times count from now."""
        core = tuple((name, _settled(name, value, self.now)) for name, value in self.core.__dict__.items())
        return tuple(self.nodes.values()), self.budget, self.known, self.broken, self.life, core


def _settled(name: str, value: object, now: float) -> object:
    """An attribute of the core as a hashable value; moments as distances from now."""
    match value:
        case _Transition():
            fields = (value.deadline - now, value.probe_at - now, value.phase, bool(value.early_trouble))
            return record_id(value.epoch), frozenset(value.waiting), *fields
        case Epoch():
            return record_id(value)
        case set():
            return frozenset(value)
        case dict():
            return tuple(value.items())  # the order of newcomers is the order of their ranks
        case float() if name == "_in_force_at":
            return min(1.0, now - value)  # a relapse is one within a second
        case float() if name.endswith(("_at", "_until", "_ends")):
            return max(0.0, value - now)
        case int() | float() | bool() | None:
            return value
    return None  # words for people, and what never changes


def copy_core(core: Membership) -> Membership:
    other = Membership.__new__(Membership)
    for name, value in core.__dict__.items():
        if isinstance(value, set | dict):
            value = value.copy()
        elif isinstance(value, _Transition):
            value = replace(value, waiting=set(value.waiting))
        other.__dict__[name] = value
    return other


def record_id(epoch: Epoch) -> int:
    key = (epoch.number, epoch.rendezvous_key, epoch.members, epoch.placement.version)
    if key not in World.record_ids:
        World.record_ids[key] = len(World.records)
        World.records.append(epoch)
    return World.record_ids[key]


@cache
def table_of(version: int, names: tuple[str, ...]) -> Placement:
    redundant = NUM_EXPERTS if len(names) > 1 else 0
    return uniform(NUM_LAYERS, NUM_EXPERTS, max(1, len(names)), redundant, version=version)


def new_core(world_key: Callable[[], str]) -> Membership:
    return Membership(
        num_attention=1,
        num_expert=1,
        place=lambda version, members, before: table_of(version, tuple(m.member_id for m in members)),
        make_key=world_key,
    )


# ---------------------------------------------------------------- what may happen


Move = tuple[str, str, int]  # what happens, to whom, with which record (-1 none)


def moves(world: World) -> Iterator[Move]:
    """Everything that may happen next; faults last."""
    for name, node in world.nodes.items():
        if node.outbox:
            yield "report arrives", name, -1
        if not (node.alive and node.started):
            continue
        if node.inbox and can_perform(name, node):
            yield "performs", name, -1
        for record in node.preparing:
            if can_finish(world, name, record):
                yield "has prepared", name, record
            elif is_hopeless(world, record):
                yield "cannot prepare", name, record
        if name not in world.known and not node.retired:
            yield "joins", name, -1
        if node.in_step >= 0:
            yield "ends its step", name, -1
        elif node.leads and not node.failed and world.budget.step:
            yield "issues a step", name, -1
    yield from faults(world)


def faults(world: World) -> Iterator[Move]:
    budget = world.budget
    for name, node in world.nodes.items():
        if not node.started:
            if budget.join:
                yield "starts", name, -1
            continue
        if not node.alive or node.retired:
            continue
        if budget.crash:
            yield "dies", name, -1
        if budget.silent:
            yield "dies in silence", name, -1
        if budget.leave and not node.leaving:
            yield "wants to leave", name, -1
        if budget.doubt and node.in_step >= 0:
            yield "doubts its step", name, -1
        if budget.suspect and ROLES[name] == "e":
            yield "is suspected", name, -1
    if budget.cut and world.core.epoch is not None:
        yield "is cut", "a link", -1
    if budget.restart:
        yield "restarts", "the Conductor", -1
    if budget.tick and world.core.next_deadline() is not None:
        yield "passes", "a deadline", -1


def make(world: World, move: Move) -> None:
    """Let it happen."""
    kind, name, record = move
    match kind:
        case "report arrives":
            report_arrives(world, name)
        case "performs":
            perform(world, name)
        case "has prepared":
            finish_prepare(world, name, record)
        case "cannot prepare":
            fail_prepare(world, name, record)
        case "joins":
            join(world, name)
        case "ends its step":
            end_step(world, name)
        case "issues a step":
            issue_step(world, name)
        case "starts":
            spend(world, "join")
            change(world, name, started=True)
        case "dies" | "dies in silence":
            crash(world, name, silent=kind == "dies in silence")
        case "wants to leave":
            leave(world, name)
        case "doubts its step":
            spend(world, "doubt")
            report(world, name, Doubt(name, number_of(world.nodes[name].in_step)))
        case "is suspected":
            spend(world, "suspect")
            tell_core(world, Suspect("a1", name, "bad rows"))
        case "is cut":
            spend(world, "cut")
            if world.core.epoch is not None:
                world.broken |= {world.core.epoch.rendezvous_key}
        case "restarts":
            restart(world)
        case "passes":
            tick(world)
        case "polls no more":
            tell_core(world, Lost(name))
        case _:
            raise AssertionError(kind)


def describe_move(world: World, move: Move) -> str:
    """Before it is made."""
    kind, name, record = move
    if kind == "report arrives":
        return f"{name}: {show(world.nodes[name].outbox[0])} arrives"
    if kind == "performs":
        return f"{name} performs {show(world.nodes[name].inbox[0])}"
    return f"{name} {kind}" + (f" {number_of(record)}" if record >= 0 else "")


def change(world: World, name: str, **fields: object) -> None:
    world.nodes[name] = replace(world.nodes[name], **fields)  # type: ignore[arg-type]


def spend(world: World, kind: str) -> None:
    world.budget = replace(world.budget, **{kind: getattr(world.budget, kind) - 1})


def report(world: World, name: str, *events: Event) -> None:
    change(world, name, outbox=world.nodes[name].outbox + events)


def tell_core(world: World, event: Event) -> None:
    """`MembershipHost.take`: mail for those who are known."""
    for command in world.core.step(event, world.now):
        node = world.nodes[command.member_id]
        if command.member_id in world.known:
            change(world, command.member_id, inbox=(*node.inbox, command))
    for name in world.known:
        if not world.core.knows(name):
            world.known -= {name}
            change(world, name, inbox=())  # its next poll tells it to join


def report_arrives(world: World, name: str) -> None:
    node = world.nodes[name]
    change(world, name, outbox=node.outbox[1:])
    tell_core(world, node.outbox[0])


def join(world: World, name: str) -> None:
    node = world.nodes[name]
    if node.leaving and node.committed < 0:
        change(world, name, retired=True, inbox=())  # nobody knows it: nobody needs it
        return
    world.known |= {name}
    change(world, name, inbox=())
    epoch = World.records[node.committed] if node.committed >= 0 else None
    tell_core(world, Join(MEMBERS[name], epoch, node.highest, node.leaving))


def can_perform(name: str, node: Node) -> bool:
    """A leader that stops waits for its step."""
    command = node.inbox[0]
    if node.in_step < 0:
        return True
    if isinstance(command, Commit):
        record = of_number(node, command.number)
        return record is None or leader_of(record) == name
    return not isinstance(command, Retire)


def perform(world: World, name: str) -> None:
    node = world.nodes[name]
    command, inbox = node.inbox[0], node.inbox[1:]
    change(world, name, inbox=inbox)
    match command:
        case Prepare(_, epoch):
            change(world, name, preparing=(*node.preparing, record_id(epoch)))
        case Commit(_, number):
            commit(world, name, number)
        case Rollback(_, number):
            kept = {
                r for r in node.prepared if World.records[r].number != number or r in (node.current, node.committed)
            }
            change(world, name, dropped=node.dropped | {number}, prepared=frozenset(kept))
        case Retire(_, number):
            change(world, name, leads=False, leaving=True, retired=True)
            report(world, name, Committed(name, number))
        case Probe():
            report(world, name, Alive(name))


def of_number(node: Node, number: int) -> int | None:
    return next((r for r in node.prepared if World.records[r].number == number), None)


def leader_of(record: int) -> str:
    epoch = World.records[record]
    return epoch.members[epoch.leader_rank].member_id


def number_of(record: int) -> int:
    return World.records[record].number if record >= 0 else 0


def commit(world: World, name: str, number: int) -> None:
    node = world.nodes[name]
    record = of_number(node, number)
    if record is None:
        raise Violation(f"{name} is told to commit epoch {number}, which it has not prepared")
    leads = leader_of(record) == name
    current = node.current if node.current >= 0 else record
    change(
        world,
        name,
        committed=record,
        leads=leads,
        failed=node.failed and not leads,
        current=current,
        highest=max(node.highest, number),
    )
    report(world, name, Committed(name, number))


def can_finish(world: World, name: str, record: int) -> bool:
    """The communicator needs everybody at it; one that is only used again needs nobody."""
    node, epoch = world.nodes[name], World.records[record]
    if node.committed >= 0 and epoch.same_membership(World.records[node.committed]):
        return True
    for member in epoch.members:
        peer = world.nodes[member.member_id]
        if not peer.alive or (record not in peer.preparing and record not in peer.prepared):
            return False
    return True


def is_hopeless(world: World, record: int) -> bool:
    """Somebody will never come to this communicator."""
    epoch = World.records[record]
    for member in epoch.members:
        peer = world.nodes[member.member_id]
        at_it = record in peer.preparing or record in peer.prepared
        will_be = any(isinstance(c, Prepare) and record_id(c.epoch) == record for c in peer.inbox)
        if not peer.alive or not (at_it or will_be):
            return True
    return False


def finish_prepare(world: World, name: str, record: int) -> None:
    node, epoch = world.nodes[name], World.records[record]
    change(world, name, preparing=tuple(r for r in node.preparing if r != record))
    if epoch.number in node.dropped:
        return
    if node.committed >= 0 and epoch.number <= number_of(node.committed):
        report(world, name, PrepareFailed(name, epoch.number, "not after the one in force"))
        return
    if any(number_of(r) > epoch.number for r in (*node.prepared, *node.preparing)):
        report(world, name, PrepareFailed(name, epoch.number, "a newer epoch was asked for meanwhile"))
        return
    kept = {r for r in node.prepared if r in (node.committed, node.current)}
    change(world, name, prepared=frozenset(kept | {record}), highest=max(node.highest, epoch.number))
    report(world, name, Prepared(name, epoch.number))


def fail_prepare(world: World, name: str, record: int) -> None:
    node = world.nodes[name]
    change(world, name, preparing=tuple(r for r in node.preparing if r != record))
    if number_of(record) not in node.dropped:
        report(world, name, PrepareFailed(name, number_of(record), "a peer did not come"))


# ---- steps


def issue_step(world: World, name: str) -> None:
    spend(world, "step")
    change(world, name, in_step=world.nodes[name].committed)


def end_step(world: World, name: str) -> None:
    """All members that the header names have entered and computed, or the step breaks."""
    record = world.nodes[name].in_step
    change(world, name, in_step=-1)
    epoch = World.records[record]
    entered = [m.member_id for m in epoch.members if can_enter(world, m.member_id, record)]
    absent = [m.member_id for m in epoch.members if m.member_id not in entered]
    for member_id in entered:
        node = world.nodes[member_id]
        newest = max((node.committed, record), key=number_of)
        kept = frozenset(r for r in node.prepared if number_of(r) >= epoch.number)
        change(world, member_id, current=of_number(node, epoch.number), committed=newest, prepared=kept)
    if len(entered) == len(epoch.members) and epoch.rendezvous_key not in world.broken:
        check_step(world, epoch)
        return
    world.broken |= {epoch.rendezvous_key}
    if world.nodes[name].committed == record:
        change(world, name, failed=True)
    for i, member_id in enumerate(entered):
        # Who waits accuses whom it waits for: one who hangs, or one who waits himself.
        accused = absent[0] if absent and i % 2 == 0 else entered[i - 1]
        report(world, member_id, Trouble(member_id, epoch.number, "the step broke", silent_id=accused))


def can_enter(world: World, name: str, record: int) -> bool:
    node = world.nodes[name]
    number = number_of(record)
    return node.alive and of_number(node, number) is not None and number >= number_of(node.current)


def check_step(world: World, epoch: Epoch) -> None:
    """Everybody works by one record, and each source's row for each expert is computed once by one who holds it."""
    names = [m.member_id for m in epoch.members]
    theirs = {World.records[of_number(world.nodes[name], epoch.number) or 0] for name in names}
    if theirs != {epoch}:
        raise Violation(f"a step of epoch {epoch.number} was made by {len(theirs)} different records")
    placement = epoch.placement
    shards = [names[rank] for rank in epoch.expert_ranks]
    for layer_id in range(NUM_LAYERS):
        held = {shard: placement.local_slots(layer_id, ep).tolist() for ep, shard in enumerate(shards)}
        for key in range(2):
            for logical in range(NUM_EXPERTS):
                physical = int(placement.logical_to_physical[layer_id, logical, key % copies(placement, logical)])
                owners = [s for ep, s in enumerate(shards) if physical // placement.slots_per_rank == ep]
                if len(owners) != 1 or held[owners[0]][physical % placement.slots_per_rank] != logical:
                    raise Violation(f"rows for expert {logical} are computed by {owners} in epoch {epoch.number}")


def copies(placement: Placement, logical: int) -> int:
    return int(placement.logical_replica_count[0, logical])


# ---- faults


def crash(world: World, name: str, *, silent: bool) -> None:
    """A killed process's sockets close: its leader, or those that it led, name it."""
    spend(world, "silent" if silent else "crash")
    change(world, name, alive=False, leads=False, in_step=-1, inbox=(), preparing=())
    if silent:
        return
    for other, node in world.nodes.items():
        if node.alive and node.committed >= 0:
            epoch = World.records[node.committed]
            if leader_of(node.committed) == name or (node.leads and any(m.member_id == name for m in epoch.members)):
                report(world, other, Trouble(other, epoch.number, "connection closed", name))


def leave(world: World, name: str) -> None:
    spend(world, "leave")
    change(world, name, leaving=True)
    report(world, name, Leave(name))


def restart(world: World) -> None:
    spend(world, "restart")
    world.life += 1
    world.core, world.known = new_core(world._key), frozenset()
    for name, node in world.nodes.items():
        change(world, name, inbox=(), outbox=node.outbox)


def tick(world: World) -> None:
    spend(world, "tick")
    deadline = world.core.next_deadline()
    assert deadline is not None
    world.now = max(world.now, deadline)
    tell_core(world, Tick())


def show(thing: Command | Event) -> str:
    match thing:
        case Prepare(_, epoch):
            return f"Prepare {epoch.number} [{' '.join(m.member_id for m in epoch.members)}]"
        case Commit(_, number) | Rollback(_, number) | Retire(_, number) | Prepared(_, number) | Committed(_, number):
            return f"{type(thing).__name__} {number}"
        case PrepareFailed(_, number, _):
            return f"PrepareFailed {number}"
        case Trouble(_, number, _, lost_id):
            return f"Trouble {number}" + (f", lost {lost_id}" if lost_id else "")
    return type(thing).__name__


def describe(world: World) -> str:
    core = world.core
    epoch = core.epoch and f"{core.epoch.number} [{' '.join(m.member_id for m in core.epoch.members)}]"
    states = ", ".join(f"{name} {state.value}" for name, state in core.states.items())
    leaders = [
        f"{n} leads {number_of(node.committed)}{' (failed)' if node.failed else ''}"
        for n, node in world.nodes.items()
        if node.leads and node.alive
    ]
    dead = [n for n, node in world.nodes.items() if not node.alive]
    return f"epoch {epoch}; {states}; {', '.join(leaders) or 'nobody leads'}; dead: {' '.join(dead) or 'none'}"
