"""The Conductor's shell, in this process and without Ray: reports, failures, watchers, the end."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from expertmesh.cluster.conductor import Conductor
from expertmesh.cluster.membership_messages import (
    Commit,
    Committed,
    Join,
    Lost,
    Prepare,
    Prepared,
    PrepareFailed,
    Rejoin,
)
from expertmesh.config import ClusterConfig
from expertmesh.router.epoch import Member
from expertmesh.router.status import ProcessStatus

ATTENTION = Member(member_id="a#1", attention=True, expert=False, control_port=1, store_port=2)
SHARD = Member(member_id="e#1", attention=False, expert=True)
GATEWAY = ProcessStatus(name="g", role="gateway", state="joining", address="127.0.0.1:5")


@pytest.fixture
def conductor(tiny_checkpoint: Path) -> Conductor:
    return Conductor(ClusterConfig(model=str(tiny_checkpoint), num_expert_shards=1).to_json())


async def form_first_epoch(conductor: Conductor) -> None:
    for member in (ATTENTION, SHARD):
        await conductor.join(Join(member))
    after = {}
    for member in (ATTENTION, SHARD):
        after[member.member_id], (command,) = await conductor.next_commands(member.member_id, 0, 1.0)
        assert isinstance(command, Prepare)
    for member in (ATTENTION, SHARD):
        await conductor.tell(Prepared(member.member_id, 1))
    for member in (ATTENTION, SHARD):
        _, (command,) = await conductor.next_commands(member.member_id, after[member.member_id], 1.0)
        assert command == Commit(member.member_id, 1)
        await conductor.tell(Committed(member.member_id, 1))


async def test_ready_needs_an_epoch_and_the_gateways(conductor: Conductor):
    await conductor.report(GATEWAY)
    await form_first_epoch(conductor)
    state = await conductor.state()
    assert (state.epoch, state.ready, state.gateways) == (1, False, ())
    await conductor.report(replace(GATEWAY, state="ready"))
    state = await conductor.state()
    assert (state.ready, state.gateways, state.ranks) == (True, ("127.0.0.1:5",), {"a#1": -1, "e#1": 0})


async def test_links_are_those_of_members_in_the_epoch(conductor: Conductor):
    await conductor.report(ProcessStatus(name="a#1", role="attention", address="h:1"))
    await conductor.report(ProcessStatus(name="a#2", role="attention", address="h:2"))
    assert (await conductor.state()).links == {}
    await form_first_epoch(conductor)
    state = await conductor.state()
    assert state.links == {"a#1": "h:1"}
    assert {p.name: p.state for p in state.processes} == {"a#1": "ready", "a#2": "loading"}


async def test_a_watcher_wakes_when_who_serves_changes_and_not_with_load(conductor: Conductor):
    await conductor.report(GATEWAY)
    seen = (await conductor.state()).version
    watcher = asyncio.create_task(conductor.watch(seen, 30.0))
    await asyncio.sleep(0)
    await conductor.report(replace(GATEWAY, num_running=3))
    await asyncio.sleep(0)
    assert not watcher.done()
    await conductor.report(replace(GATEWAY, state="draining"))
    assert (await watcher).version > seen
    assert (await conductor.watch(seen, 0.0)).version > seen  # an old version is answered at once


async def test_times_of_damaged_weights_reach_the_watchers_once(conductor: Conductor):
    shard = ProcessStatus(name="e#1", role="expert", suspect_spans=((10.0, 11.5),))
    await conductor.report(replace(shard, suspect_spans=()))
    seen = (await conductor.state()).version
    await conductor.report(shard)
    state = await conductor.watch(seen, 0.0)
    assert (state.version > seen, state.suspect_spans) == (True, ((10.0, 11.5),))
    await conductor.report(shard)
    assert (await conductor.state()).version == state.version


async def test_a_member_that_was_given_up_and_lives_is_counted(conductor: Conductor):
    await form_first_epoch(conductor)
    await conductor.tell(Lost("e#1"))
    assert (await conductor.state()).num_returned == 0
    await conductor.join(Join(SHARD))
    state = await conductor.state()
    assert state.num_returned == 1
    assert state.decisions[-1].text == "e#1 was given up and lives: it joins again"


async def test_a_hopeless_member_is_a_failure_of_the_start(conductor: Conductor):
    for member in (ATTENTION, SHARD):
        await conductor.join(Join(member))
    await conductor.tell(PrepareFailed("a#1", 1, "EpochError: a peer did not come"))
    assert (await conductor.state()).failures == ()
    await conductor.tell(PrepareFailed("e#1", 1, "CheckpointError: truncated"))
    assert (await conductor.state()).failures == ("e#1: CheckpointError: truncated",)


async def test_when_the_cluster_ends_nobody_waits_for_another(conductor: Conductor):
    await form_first_epoch(conductor)
    poll = asyncio.create_task(conductor.next_commands("e#1", 2, 30.0))
    await asyncio.sleep(0)
    await conductor.close()
    assert await poll == (0, [Rejoin("e#1")])
    assert await conductor.next_commands("a#1", 2, 30.0) == (0, [Rejoin("a#1")])


async def test_a_process_that_ended_is_forgotten(conductor: Conductor):
    await conductor.report(GATEWAY)
    await conductor.forget("g")
    assert (await conductor.state()).processes == ()
