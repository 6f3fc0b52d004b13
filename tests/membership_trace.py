"""A membership core under test, and what goes in and out of it as text."""

import itertools
import os
from pathlib import Path

from expertmesh.cluster.membership import Membership, uniform_place
from expertmesh.cluster.membership_messages import (
    Alive,
    Commit,
    Committed,
    Doubt,
    Join,
    Leave,
    Lost,
    PlacementRequested,
    Prepare,
    Prepared,
    PrepareFailed,
    Retire,
    Rollback,
    Suspect,
    Tick,
    Trouble,
)
from expertmesh.router.epoch import Member

TRACES = Path(__file__).parent / "traces"


def member(name):
    """`a1` an attention replica, `e1` a shard, `c1` both."""
    return Member(member_id=name, attention=name[0] in "ac", expert=name[0] in "ec", store_port=7)


def core(num_attention=1, num_expert=2, first_key=1, patience_s=2.0):
    keys = (f"key{i}" for i in itertools.count(first_key))
    return Membership(
        num_attention=num_attention,
        num_expert=num_expert,
        place=uniform_place(2, 8, 0),
        make_key=lambda: next(keys),
        prepare_timeout_s=30.0,
        commit_timeout_s=10.0,
        probe_timeout_s=patience_s,
        rejoin_timeout_s=max(10.0, patience_s),
        watch_interval_s=10.0,
        retry_s=1.0,
    )


class Trace:
    """Feeds the core and writes down what goes in and out, one line each."""

    def __init__(self, name, membership):
        self.name, self.core, self.now, self.lines = name, membership, 0.0, []

    def say(self, event, at=None):
        self.now = self.now if at is None else at
        self.lines.append(f"{self.now:5.1f}  {show_event(event)}")
        commands = self.core.step(event, self.now)
        self.lines += [f"         -> {show_command(c)}" for c in commands]
        return commands

    def finish(self):
        members = ", ".join(f"{name} {state.value}" for name, state in self.core.states.items())
        self.lines.append(f"end: epoch {show_epoch(self.core.epoch)}; {members}; ready {self.core.ready}")
        path, text = TRACES / f"membership_{self.name}.txt", "\n".join(self.lines) + "\n"
        if os.environ.get("EXPERTMESH_REWRITE_TRACES"):
            TRACES.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text(), f"the trace {path.name} has changed: rewrite it, read the difference"


def show_epoch(epoch):
    if epoch is None:
        return "none"
    names = " ".join(m.member_id for m in epoch.members)
    return f"{epoch.number} [{names}] placement {epoch.placement_version} {epoch.rendezvous_key}"


def show_event(event):
    match event:
        case Join(who, _, _, True):
            return f"Join {who.member_id} to leave"
        case Join(who, epoch, highest):
            return f"Join {who.member_id}" + (f" in epoch {epoch.number}, highest {highest}" if epoch else "")
        case PlacementRequested(_):
            return "PlacementRequested"
        case Tick():
            return "Tick"
        case Suspect(who, suspect_id, reason):
            return f"Suspect {who}: {suspect_id}, {reason}"
        case Trouble(who, number, reason, lost_id) if lost_id:
            return f"Trouble {who} {number}: {reason}; lost {lost_id}"
        case Trouble(who, number, reason, _, silent_id) if silent_id:
            return f"Trouble {who} {number}: {reason}; silent {silent_id}"
        case PrepareFailed(who, number, reason) | Trouble(who, number, reason):
            return f"{type(event).__name__} {who} {number}: {reason}"
        case Prepared(who, number) | Committed(who, number) | Doubt(who, number):
            return f"{type(event).__name__} {who} {number}"
        case Alive(who) | Leave(who) | Lost(who):
            return f"{type(event).__name__} {who}"
    raise TypeError(event)


def show_command(command):
    match command:
        case Prepare(who, epoch):
            return f"{who}: Prepare {show_epoch(epoch)}"
        case Commit(who, number) | Rollback(who, number) | Retire(who, number):
            return f"{who}: {type(command).__name__} {number}"
    return f"{command.member_id}: {type(command).__name__}"


def start(trace, names):
    for name in names:
        trace.say(Join(member(name)))
    for name in names:
        trace.say(Prepared(name, 1))
    for name in names:
        trace.say(Committed(name, 1))
    assert trace.core.ready


def agree(trace, number, names, leader=None):
    """All prepare; the leader in force commits first, then the others."""
    for name in names:
        trace.say(Prepared(name, number))
    for name in ([leader] if leader else []) + [n for n in names if n != leader]:
        trace.say(Committed(name, number))
