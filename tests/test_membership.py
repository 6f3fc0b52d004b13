"""The membership core as readable traces (tests/traces/membership_*.txt; `EXPERTMESH_REWRITE_TRACES=1` rewrites them),
and real agents on it with small meshes."""

import asyncio
import itertools
import os
import random
from pathlib import Path

import pytest

from expertmesh.cluster.member_agent import MemberAgent
from expertmesh.cluster.membership import (
    Alive,
    Commit,
    Committed,
    Join,
    Leave,
    Lost,
    Membership,
    PlacementRequested,
    Prepare,
    Prepared,
    PrepareFailed,
    Probe,
    Rejoin,
    Retire,
    Rollback,
    State,
    Suspect,
    Tick,
    Trouble,
    uniform_place,
)
from expertmesh.cluster.membership_host import MembershipHost
from expertmesh.errors import EpochError, Unavailable
from expertmesh.router.epoch import Member
from expertmesh.router.placement import uniform

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
        case Prepared(who, number) | Committed(who, number):
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


def test_the_first_epoch_forms_when_the_configured_members_are_there():
    trace = Trace("start", core())
    trace.say(Join(member("e1")))
    trace.say(Join(member("a1")))
    assert trace.core.epoch is None
    trace.say(Join(member("e2")))
    agree(trace, 1, ["e1", "a1", "e2"])
    trace.finish()


def test_a_placement_changes_without_a_new_communicator():
    trace = Trace("placement", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(PlacementRequested(uniform(2, 8, 2, 4)), at=5.0)
    agree(trace, 2, ["a1", "e1", "e2"], leader="a1")
    trace.say(PlacementRequested(uniform(2, 8, 3)), at=6.0)  # for three ranks: not ours
    trace.finish()


def test_a_failed_preparation_is_rolled_back_and_tried_again():
    trace = Trace("prepare_failed", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(Join(member("e3")), at=5.0)
    trace.say(Prepared("a1", 2))
    trace.say(PrepareFailed("e1", 2, "no memory"), at=6.0)
    trace.say(Prepared("e2", 2))  # too late, but a sign of life
    for name in ("a1", "e1", "e3"):
        trace.say(Alive(name), at=6.2)
    trace.say(Tick(), at=6.5)
    trace.say(Tick(), at=7.0)
    agree(trace, 3, ["a1", "e1", "e2", "e3"], leader="a1")
    trace.finish()


def test_a_dead_newcomer_that_fails_every_preparation_is_asked_for_and_left_out():
    trace = Trace("dead_newcomer", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(Join(member("e3")), at=5.0)
    trace.say(PrepareFailed("a1", 2, "connection refused"), at=5.1)  # by e3, which has died
    for name in ("a1", "e1", "e2"):
        trace.say(Alive(name))
    assert trace.core.next_deadline() == 7.1  # the retry waits for e3's sign of life
    trace.say(Tick(), at=7.1)
    assert trace.core.ready
    trace.finish()


def test_a_dead_shard_is_left_out_and_its_successor_let_in():
    trace = Trace("death", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(Trouble("a1", 1, "rank 2 is gone"), at=5.0)
    trace.say(Trouble("e1", 1, "rank 0 is gone"))
    trace.say(Alive("a1"))
    trace.say(Alive("e1"))
    trace.say(Tick(), at=6.9)
    trace.say(Tick(), at=7.0)
    agree(trace, 2, ["a1", "e1"], leader="a1")
    trace.say(Join(member("e2x")), at=9.0)
    agree(trace, 3, ["a1", "e1", "e2x"], leader="a1")
    trace.say(Alive("e2"), at=20.0)  # it was only stopped for a while
    trace.say(Join(member("e2")))
    agree(trace, 4, ["a1", "e1", "e2x", "e2"], leader="a1")
    trace.finish()


def test_a_suspect_shard_is_drained_where_another_can_do_its_work():
    trace = Trace("suspect", core(num_expert=1))
    start(trace, ["a1", "e1"])
    trace.say(Suspect("a1", "e1", "3 bad rows"), at=5.0)  # the only one: it serves on
    assert trace.core.ready
    trace.say(Join(member("e2")), at=6.0)
    agree(trace, 2, ["a1", "e1", "e2"], leader="a1")
    trace.say(Suspect("a1", "e1", "3 bad rows"), at=65.0)
    trace.say(Suspect("a1", "e1", "3 bad rows"))  # another attention replica saw it too
    agree(trace, 3, ["a1", "e2"], leader="a1")
    trace.say(Committed("e1", 3))
    trace.say(Suspect("a1", "e1", "late news"), at=70.0)
    assert trace.core.ready
    trace.finish()


def test_an_epoch_that_breaks_again_and_again_is_formed_at_a_slower_pace():
    trace = Trace("relapses", core(num_expert=1))
    start(trace, ["a1", "e1"])
    for number in range(1, 6):
        trace.say(Trouble("a1", number, "a product is not finite"), at=trace.now + 0.1)
        trace.say(Alive("a1"))
        trace.say(Alive("e1"))
        trace.say(
            Tick(), at=max(trace.now, trace.core.next_deadline() or 0.0) if not trace.core.changing else trace.now
        )
        agree(trace, number + 1, ["a1", "e1"], leader="a1")
    assert 7.0 < trace.now < 8.0  # two at once, then after 1, 2 and 4 s
    trace.say(Trouble("a1", 6, "much later"), at=30.0)
    trace.say(Alive("a1"))
    trace.say(Alive("e1"))
    assert trace.core.changing
    agree(trace, 7, ["a1", "e1"], leader="a1")
    trace.finish()


def test_a_death_that_is_known_needs_no_probe():
    trace = Trace("lost", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(Lost("e2"), at=5.0)
    trace.say(Prepared("a1", 2))
    trace.say(Lost("e1"))  # within the transition; nobody is left who owns experts
    trace.say(Join(member("e3")), at=8.0)
    agree(trace, 3, ["a1", "e3"], leader="a1")
    trace.finish()


def test_a_member_leaves_in_good_order_the_leader_too():
    trace = Trace("leave", core(num_attention=2))
    start(trace, ["a1", "a2", "e1", "e2"])
    trace.say(Leave("e1"), at=5.0)
    agree(trace, 2, ["a1", "a2", "e2"], leader="a1")
    trace.say(Committed("e1", 2))
    trace.say(Leave("a1"), at=6.0)
    for name in ("a2", "e2"):
        trace.say(Prepared(name, 3))
    trace.say(Committed("a1", 3))  # its last step is over: now the others
    for name in ("a2", "e2"):
        trace.say(Committed(name, 3))
    trace.say(Leave("e2"), at=7.0)  # the last that owns experts stays until another comes
    trace.say(Join(member("e3")), at=9.0)
    agree(trace, 4, ["a2", "e3"], leader="a2")
    trace.say(Committed("e2", 4))
    trace.finish()


def test_a_member_that_hangs_while_it_prepares_is_left_out():
    trace = Trace("hang_in_prepare", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(Join(member("e3")), at=5.0)
    for name in ("a1", "e1", "e2"):
        trace.say(Prepared(name, 2))
    trace.say(Tick(), at=15.0)
    trace.say(Tick(), at=25.0)
    trace.finish()


def test_a_restarted_conductor_adopts_the_highest_epoch():
    trace = Trace("restart", core())
    start(trace, ["a1", "e1", "e2"])
    epoch = trace.core.epoch
    trace.core = core(first_key=101)
    trace.lines.append("       (restart)")
    trace.say(Join(member("e1"), epoch, 2), at=0.0)  # it had prepared an epoch 2 that never was committed
    trace.say(Join(member("a1"), epoch, 1))
    trace.say(Tick(), at=9.0)
    trace.say(Join(member("e2"), epoch, 1))
    assert trace.core.ready
    trace.say(Join(member("e3")), at=20.0)
    agree(trace, 1003, ["a1", "e1", "e2", "e3"], leader="a1")
    trace.finish()


def test_a_late_answer_to_a_former_conductor_is_none_to_the_new_one():
    """It had asked for an epoch that nobody had told of when the new one numbers its first."""
    trace = Trace("late_answer", core())
    start(trace, ["a1", "e1", "e2"])
    epoch = trace.core.epoch
    trace.core = core(first_key=101)
    trace.lines.append("       (restart; epoch 2 was being prepared)")
    trace.say(Join(member("a1"), epoch, 1), at=0.0)
    trace.say(Join(member("e1"), epoch, 1))
    trace.say(Tick(), at=10.0)
    assert trace.core._transition.epoch.number == 1002
    trace.say(Prepared("a1", 2))
    trace.say(Prepared("e1", 2))
    assert trace.core._transition.waiting == {"a1", "e1"}
    agree(trace, 1002, ["a1", "e1"], leader="a1")
    trace.finish()


def test_who_was_given_up_and_joined_again_is_not_let_go_with_the_epoch_that_left_it_out():
    trace = Trace("returned", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(Trouble("a1", 1, "control channel of 'e2' closed", "e2"), at=5.0)  # a false alarm
    trace.say(Join(member("e2"), trace.core.epoch, 1), at=5.1)
    trace.say(Prepared("a1", 2), at=5.2)
    trace.say(Prepared("e1", 2))
    trace.say(Committed("a1", 2))
    told = trace.say(Committed("e1", 2))
    assert [type(c) for c in told if c.member_id == "e2"] == [Prepare]
    agree(trace, 3, ["a1", "e1", "e2"], leader="a1")
    trace.finish()


def test_a_restart_inside_a_commit_brings_all_into_one_epoch():
    trace = Trace("restart_in_commit", core())
    start(trace, ["a1", "e1", "e2"])
    first = trace.core.epoch
    second = trace.say(PlacementRequested(uniform(2, 8, 2, 4)), at=5.0)[0].epoch
    trace.core = core(first_key=101)
    trace.lines.append("       (restart; only a1 was told to commit)")
    trace.say(Join(member("e1"), first, 2), at=6.0)
    trace.say(Join(member("a1"), second, 2))
    trace.say(Join(member("e2"), first, 2))
    agree(trace, 1003, ["a1", "e1", "e2"], leader="a1")
    trace.finish()


@pytest.mark.parametrize("seed", range(150))
def test_random_histories_never_mix_epochs_and_always_settle(seed):
    """Members obey, fail, die, come and leave at random; answers arrive late. Never is one epoch number two epochs or
    one placement version two tables; never does a member commit what it did not prepare; in the end all are in one
    epoch."""
    rng = random.Random(seed)
    membership, now = core(num_attention=2, num_expert=2), 0.0
    alive = {name: [] for name in ("a1", "a2", "e1", "e2", "e3")}  # name -> answers not delivered yet
    prepared, epochs, tables, names = {}, {}, {}, itertools.count(10)
    answers, victims = [Join(member(name)) for name in alive], []

    def perform(commands):
        for command in commands:
            name = command.member_id
            match command:
                case Prepare(_, epoch):
                    assert epochs.setdefault(epoch.number, epoch) is epoch
                    table = epoch.placement.physical_to_logical
                    assert tables.setdefault(epoch.placement_version, table).equal(table)
                    assert len({m.member_id for m in epoch.members}) == len(epoch.members)
                    if name in alive:
                        prepared.setdefault(name, set()).add(epoch.number)
                        answers.append(Prepared(name, epoch.number))
                case Commit(_, number) | Retire(_, number):
                    if name in alive:
                        assert isinstance(command, Retire) or number in prepared[name], "commit without prepare"
                        answers.append(Committed(name, number))
                case Rollback(_, number):
                    if name in alive:
                        prepared[name].discard(number)
                case Probe():
                    if name in alive:
                        answers.append(Alive(name))
                case _:
                    if name in alive:
                        answers.append(Join(member(name)))

    for _ in range(120):
        now += 0.05
        dice = rng.random()
        if dice < 0.04 and len([n for n in alive if n[0] == "e"]) > 1:
            victim = rng.choice([n for n in alive if n[0] == "e"])
            del alive[victim]
            victims.append(victim)
            if rng.random() < 0.5:
                answers.append(Lost(victim))
            elif membership.epoch:
                answers.append(Trouble(rng.choice(sorted(alive)), membership.epoch.number, f"{victim} is gone"))
        elif dice < 0.08:
            name = f"{rng.choice('ae')}{next(names)}"
            alive[name] = []
            answers.append(Join(member(name)))
        elif dice < 0.10 and membership.epoch:
            answers.append(PlacementRequested(uniform(2, 8, max(1, len(membership.epoch.expert_ranks)), 4)))
        elif dice < 0.13 and membership.changing:
            answers.append(PrepareFailed(rng.choice(sorted(alive)), membership._transition.epoch.number, "chance"))
        elif dice < 0.2:
            answers.append(Tick())
        if answers:
            perform(membership.step(answers.pop(rng.randrange(len(answers)) if rng.random() < 0.2 else 0), now))
    while len([n for n in alive if n[0] == "e"]) < 2:  # the first epoch waits for as many
        name = f"e{next(names)}"
        alive[name] = []
        answers.append(Join(member(name)))
    answers += [Lost(victim) for victim in victims]  # at last every death is known
    for _ in range(400):  # quiet: everything is delivered, time passes
        if answers:
            perform(membership.step(answers.pop(0), now))
        else:
            answers += [Join(member(name)) for name in alive if not membership.knows(name)]  # as its next poll does
            now = max(now + 0.1, membership.next_deadline() or 0.0)
            perform(membership.step(Tick(), now))
            if membership.ready and not answers:
                break
    assert membership.ready, membership.last_failure
    assert {m.member_id for m in membership.epoch.members} <= set(alive)
    assert all(membership.states[m.member_id] is State.READY for m in membership.epoch.members)


# ---- agents


class SmallMesh:
    """What an agent drives, without processes: it remembers."""

    def __init__(self, name):
        self.member, self.epoch, self.highest_number = member(name), None, 0
        self.prepared, self.log, self.refuse = {}, [], False

    def prepare(self, epoch):
        if self.refuse:
            self.refuse = False
            raise EpochError("not now")
        self.highest_number = max(self.highest_number, epoch.number)
        self.prepared[epoch.number] = epoch
        self.log.append(("prepare", epoch.number))

    def commit(self, number):
        self.epoch = self.prepared[number]
        self.log.append(("commit", number))

    def rollback(self, number):
        self.prepared.pop(number, None)
        self.log.append(("rollback", number))

    def retire(self):
        self.log.append(("retire",))


class Wire:
    """Calls into the host's loop from the agents' loops; may be cut."""

    def __init__(self, loop):
        self.loop, self.host, self.changed = loop, None, asyncio.Event()

    def install(self, membership):
        if self.host:
            self.host.close()
        self.host = MembershipHost(membership, on_change=self.changed.set)

    async def _call(self, method, *args):
        if self.host is None:
            raise Unavailable("cut")
        future = asyncio.run_coroutine_threadsafe(getattr(self.host, method)(*args), self.loop)
        return await asyncio.wrap_future(future)

    async def join(self, event):
        return await self._call("join", event)

    async def tell(self, event):
        return await self._call("tell", event)

    async def next_commands(self, member_id, after, timeout_s):
        return await self._call("next_commands", member_id, after, 0.05)

    async def until(self, condition):
        async with asyncio.timeout(20):
            while not condition(self.host.core):
                self.changed.clear()
                await self.changed.wait()


async def test_agents_follow_the_conductor_through_its_restart_and_leave():
    wire = Wire(asyncio.get_running_loop())
    wire.install(core(patience_s=60.0))  # nobody is dead here, however slow
    meshes = {name: SmallMesh(name) for name in ("a1", "e1", "e2")}
    meshes["e1"].refuse = True
    agents = {name: MemberAgent(mesh, wire) for name, mesh in meshes.items()}
    for agent in agents.values():
        await asyncio.to_thread(agent.start)
    await wire.until(lambda c: c.ready)
    assert {m.epoch.number for m in meshes.values()} == {2}  # 1 was refused once
    wire.install(core(patience_s=60.0))  # a Conductor without a memory
    await wire.until(lambda c: c.ready)
    assert wire.host.core.epoch.number == 2
    agents["a1"].on_trouble(2, EpochError("broken"))
    await wire.until(lambda c: c.ready and c.epoch.number == 1003)
    assert await asyncio.to_thread(agents["e2"].drain, 20.0)
    await wire.until(lambda c: c.ready and c.epoch.number == 1004)
    assert meshes["e2"].log[-1] == ("retire",)
    assert {m.member_id for m in meshes["a1"].epoch.members} == {"a1", "e1"}
    late = MemberAgent(SmallMesh("e3"), wire)
    await asyncio.to_thread(late.start)
    await wire.until(lambda c: c.ready and "e3" in c.states)
    wire.host.take(Leave("e1"))  # an operator's wish
    await wire.until(lambda c: c.ready and "e1" not in c.states)
    assert agents["e1"].retired
    wire.host.take(Lost("e3"))  # a false alarm: it joins again
    await wire.until(lambda c: c.ready and c.states["e3"] is State.READY and c.epoch.number > 1006)
    assert {m.member_id for m in meshes["a1"].epoch.members} == {"a1", "e3"}
    for agent in (*agents.values(), late):
        await asyncio.to_thread(agent.stop)
    wire.host.close()


async def test_a_leave_that_overtakes_the_join_is_not_forgotten():
    wire = Wire(asyncio.get_running_loop())
    wire.install(core(patience_s=60.0))
    agents = {name: MemberAgent(SmallMesh(name), wire) for name in ("a1", "e1", "e2")}
    for agent in agents.values():
        await asyncio.to_thread(agent.start)
    await wire.until(lambda c: c.ready)
    told, gate = asyncio.Event(), asyncio.Event()
    join, tell = wire.host.join, wire.host.tell

    async def slow_join(event):
        await gate.wait()
        await join(event)

    async def seen_tell(event):
        await tell(event)
        if isinstance(event, Leave):
            told.set()

    wire.host.join, wire.host.tell = slow_join, seen_tell
    wire.host.take(Lost("e2"))  # a false alarm: it comes back, and its join takes its time
    drained = asyncio.create_task(asyncio.to_thread(agents["e2"].drain, 20.0))
    await told.wait()
    gate.set()
    assert await drained
    await wire.until(lambda c: c.ready and "e2" not in {m.member_id for m in c.epoch.members})
    for agent in agents.values():
        await asyncio.to_thread(agent.stop)
    wire.host.close()


async def test_numbers_of_a_former_conductor_acknowledge_nothing():
    former = core()
    for name in ("a1", "e1", "e2"):
        former.step(Join(member(name)), 0.0)
    for answer in (Prepared, Committed):
        for name in ("a1", "e1", "e2"):
            former.step(answer(name, 1), 0.0)
    host = MembershipHost(core(patience_s=60.0))
    await host.join(Join(member("a1"), former.epoch, 1))  # e1 and e2 are adopted
    await host.tell(Trouble("a1", 1, "broken"))
    assert (await host.next_commands("e2", 7, 0.0))[1] == [Rejoin("e2")]
    for name in ("e1", "e2"):
        await host.join(Join(member(name), former.epoch, 1))
        await host.tell(Alive(name))
    await host.tell(Alive("a1"))
    for name in ("a1", "e1", "e2"):
        commands = (await host.next_commands(name, 0, 0.0))[1]
        assert [c.epoch.number for c in commands if isinstance(c, Prepare)] == [1002]
    host.close()


def test_who_missed_the_deadline_is_not_waited_for_when_all_others_answer():
    """A stopped shard: the others name it and each other, and answer; nobody else is given up in haste."""
    trace = Trace("missed_deadline", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(Trouble("a1", 1, "rank 2 sent nothing for 3.0 s", "", "e2"), at=5.0)
    trace.say(Trouble("e1", 1, "rank 0 sent nothing for 3.0 s", "", "a1"), at=5.05)  # it waits behind the other two
    assert trace.core.next_deadline() == pytest.approx(5.15)
    trace.say(Alive("a1"))
    trace.say(Alive("e1"))
    trace.say(Tick(), at=5.3)
    agree(trace, 2, ["a1", "e1"], leader="a1")
    trace.say(Join(member("e2")), at=6.0)
    agree(trace, 3, ["a1", "e1", "e2"], leader="a1")
    trace.say(Trouble("a1", 3, "rank 2 sent nothing for 3.0 s", "", "e2"), at=20.0)
    trace.say(Tick(), at=20.3)  # e1 has not answered either: all are slow, nobody is given up yet
    assert trace.core.states["e2"] is not State.DEAD
    trace.say(Alive("a1"), at=20.3)
    trace.say(Alive("e1"), at=20.4)
    assert trace.core.next_deadline() == pytest.approx(20.55)  # a moment more than the slowest other needed
    trace.say(Alive("e2"), at=20.5)
    agree(trace, 4, ["a1", "e1", "e2"], leader="a1")
    trace.say(Trouble("a1", 4, "rank 2 sent nothing for 3.0 s", "", "e2"), at=30.0)
    trace.say(Alive("a1"), at=30.1)
    trace.say(Tick(), at=30.25)
    trace.say(Alive("e1"), at=30.6)  # slow, and there
    trace.say(Tick(), at=30.85)
    agree(trace, 5, ["a1", "e1"], leader="a1")
    trace.finish()


def test_a_closed_connection_needs_no_probe_and_a_member_may_return_only_to_leave():
    trace = Trace("closed_connection", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(Trouble("e1", 1, "rank 2 is gone"), at=5.0)
    trace.say(Trouble("a1", 1, "control channel of 'e2' closed", "e2"), at=5.0)
    agree(trace, 2, ["a1", "e1"], leader="a1")
    assert trace.core.ready
    trace.say(Trouble("a1", 1, "old news", "e1"))  # of an epoch that is over
    trace.say(Join(member("e2"), leaving=True))
    assert trace.core.ready
    trace.finish()
