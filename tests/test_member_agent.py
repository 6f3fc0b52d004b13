"""Real agents on the membership core, with small meshes."""

import asyncio

from membership_trace import core, member

from expertmesh.cluster.member_agent import MemberAgent
from expertmesh.cluster.membership import State
from expertmesh.cluster.membership_host import MembershipHost
from expertmesh.cluster.membership_messages import (
    Alive,
    Committed,
    Doubt,
    Join,
    Leave,
    Lost,
    Prepare,
    Prepared,
    Rejoin,
    Trouble,
)
from expertmesh.errors import EpochError, ExchangeTimeout, Unavailable


class SmallMesh:
    """What an agent drives, without processes: it remembers."""

    def __init__(self, name):
        self.member, self.epoch, self.highest_number = member(name), None, 0
        self.prepared, self.log, self.refuse = {}, [], False
        self.step = None

    def long_step(self):
        return self.step

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


async def test_a_long_step_is_told_once_and_its_member_that_hangs_is_given_up_at_the_first_accusation():
    wire = Wire(asyncio.get_running_loop())
    wire.install(core(patience_s=60.0))
    meshes = {name: SmallMesh(name) for name in ("a1", "e1", "e2")}
    agents = {name: MemberAgent(mesh, wire) for name, mesh in meshes.items()}
    for agent in agents.values():
        await asyncio.to_thread(agent.start)
    await wire.until(lambda c: c.ready)
    doubts, tell, join, hung = [], wire.host.tell, wire.host.join, {"e2"}

    async def tell_of_the_living(event):
        doubts.extend([event] if isinstance(event, Doubt) else [])
        if event.member_id not in hung:
            await tell(event)

    async def join_of_the_living(event):
        if event.member.member_id in hung:
            raise Unavailable("it hangs")
        await join(event)

    wire.host.tell, wire.host.join = tell_of_the_living, join_of_the_living
    meshes["a1"].step = (1, 7)
    await wire.until(lambda c: c._mute == {"e2"})
    await asyncio.sleep(0.5)
    assert doubts == [Doubt("a1", 1)]
    peer = meshes["a1"].epoch.rank_of("e2")
    agents["a1"].on_trouble(1, ExchangeTimeout("it sent nothing", peer=peer, ep_rank=1, layer_id=0, step_id=7, epoch=1))
    await wire.until(lambda c: c.ready and c.epoch.number == 2)
    assert {m.member_id for m in meshes["a1"].epoch.members} == {"a1", "e1"}
    hung.clear()
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
