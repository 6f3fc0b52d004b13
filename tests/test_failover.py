"""Members with their agents and a Conductor's core, all real but Ray: a shard is killed under running steps, the others
form the next epoch by themselves, run the broken step again and go on with the same outputs."""

import asyncio
import pickle
import secrets

import mesh_worlds
import process_world
import torch

from expertmesh.cluster.membership import Membership, uniform_place
from expertmesh.cluster.membership_host import MembershipHost
from expertmesh.config import ExchangeConfig
from expertmesh.router.local_mesh import LocalMesh

EXCHANGE = ExchangeConfig(timeout_base_s=20.0, timeout_per_row_s=0.0, epoch_timeout_s=20.0)


async def serve(host):
    """Carries the agents' calls to the host."""

    async def answer(reader, writer):
        method, *arguments = pickle.loads(await reader.read())
        writer.write(pickle.dumps(await getattr(host, method)(*arguments)))
        await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", 0)


class Watched:
    def __init__(self, num_attention, num_expert):
        self.changed = asyncio.Event()
        layers = mesh_worlds.LAYERS
        self.core = Membership(
            num_attention=num_attention,
            num_expert=num_expert,
            place=uniform_place(mesh_worlds.NUM_LAYERS, mesh_worlds.NUM_EXPERTS, 4, layers),
            make_key=lambda: secrets.token_hex(8),
            probe_timeout_s=60.0,  # longer than this test waits: the closed control channel tells it
        )
        self.host = MembershipHost(self.core, on_change=self.changed.set)

    async def until(self, condition):
        async with asyncio.timeout(60):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def outputs_of_one_process(batches):
    local = LocalMesh(mesh_worlds.TinyExperts(), mesh_worlds.placement(1, 1), mesh_worlds.SHAPE)
    headers = []
    local.start(headers.append)
    outputs = []
    for batch in batches:
        local.bid(batch[1], 0)
        outputs.append(mesh_worlds.toy_model(local.enter(headers.pop()), *batch))
    local.close()
    return outputs


async def ask(world, rank, method, *arguments):
    world.connections[rank].send((method, arguments))
    return await asyncio.to_thread(world.receive, rank)


async def test_a_killed_shard_costs_no_output_and_a_new_one_joins():
    watched = Watched(num_attention=1, num_expert=2)
    server = await serve(watched.host)
    port = server.sockets[0].getsockname()[1]
    batches = [(i, 1 + i % 5) for i in range(60)]
    with process_world.ProcessWorld(mesh_worlds.agent_process, 3, "aee", EXCHANGE, port, "member") as world:
        await watched.until(lambda: watched.core.ready)
        await ask(world, 0, "submit", batches[:20])
        done = await ask(world, 0, "collect", 20)
        before = watched.core.epoch.number
        await ask(world, 2, "die_in_next_step")
        await ask(world, 0, "submit", batches[20:40])
        failed = await ask(world, 0, "collect", 1)
        assert failed[0][1].startswith("PeerLost")
        assert failed[0][0] == 20
        await watched.until(lambda: watched.core.ready and watched.core.epoch.number > before)  # the leader named it
        done += await ask(world, 0, "collect", 20)
        assert {epoch for _, _, epoch in done[20:]} == {watched.core.epoch.number}
        with process_world.ProcessWorld(mesh_worlds.agent_process, 1, "e", EXCHANGE, port, "newcomer") as newcomer:
            await watched.until(lambda: watched.core.ready and len(watched.core.epoch.members) == 3)
            await ask(world, 0, "submit", batches[40:])
            done += await ask(world, 0, "collect", 20)
            assert {epoch for _, _, epoch in done[40:]} == {watched.core.epoch.number}
            assert (await ask(newcomer, 0, "report"))[3] > 0, "the new shard computed nothing"
    assert [batch_id for batch_id, _, _ in done] == [batch_id for batch_id, _ in batches]
    for (_, output, _), want in zip(done, outputs_of_one_process(batches), strict=True):
        assert isinstance(output, torch.Tensor), output
        assert output.equal(want)
    watched.host.close()
    server.close()


async def test_a_shard_whose_rows_come_back_damaged_is_drained_and_no_output_changes():
    watched = Watched(num_attention=1, num_expert=2)
    server = await serve(watched.host)
    port = server.sockets[0].getsockname()[1]
    batches = [(i, 1 + i % 5) for i in range(40)]
    done, num_replays = [], 0
    with process_world.ProcessWorld(mesh_worlds.agent_process, 3, "aee", EXCHANGE, port, "member", 2) as world:
        await watched.until(lambda: watched.core.ready)
        await ask(world, 0, "submit", batches[:30])
        while len(done) < 30:
            ((batch_id, output, epoch),) = await ask(world, 0, "collect", 1)
            if isinstance(output, torch.Tensor):
                done.append((batch_id, output, epoch))
            else:
                assert output.startswith("GuardError: "), output
                assert "shard member2#0" in output
                num_replays += 1
        await watched.until(lambda: watched.core.ready and len(watched.core.epoch.members) == 2)
        assert "member2#0 is drained: 3 bad rows within 60 s" in watched.core.last_failure
        await ask(world, 0, "submit", batches[30:])
        done += await ask(world, 0, "collect", 10)
    assert num_replays >= 3
    assert [batch_id for batch_id, _, _ in done] == [batch_id for batch_id, _ in batches]
    for (_, output, _), want in zip(done, outputs_of_one_process(batches), strict=True):
        assert output.equal(want)
    watched.host.close()
    server.close()
