"""An operator's calls reach the Conductor, from the gateway's host or with the token; mistakes are typed errors."""

import pytest
from gateway_world import TOKEN, FixedTopology, gateway, say

from expertmesh import cli
from expertmesh.client import AsyncClient
from expertmesh.errors import InvalidRequest, Unauthenticated, Unavailable
from expertmesh.router.gateway import cluster_service
from expertmesh.router.status import Decision, ScaleWish


class Recording(FixedTopology):
    """A Conductor that says what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[object] = []

    async def scale(self, wish: ScaleWish) -> str:
        self.asked.append(wish)
        return str(wish)

    async def drain(self, member_id: str) -> str:
        self.asked.append(member_id)
        if member_id != "e":
            raise InvalidRequest("member_id", member_id, "one of the expert shards e")
        return "e leaves"

    async def rebalance(self, reason: str) -> str:
        self.asked.append(reason)
        return "2 copies"


async def test_an_operators_calls_reach_the_conductor():
    conductor = Recording()
    async with gateway(say("x"), topology=conductor) as world, AsyncClient(world.server.address) as client:
        assert await client.scale(3) == "3 shards"
        assert await client.scale(min_shards=2, max_shards=5) == "2 to 5 shards"
        assert await client.drain("e") == "e leaves"
        assert await client.rebalance() == "2 copies"
        wishes = [ScaleWish(num_shards=3), ScaleWish(min_shards=2, max_shards=5)]
        assert conductor.asked == [*wishes, "e", "asked for"]
        for wrong in ({"num_shards": 3, "min_shards": 1}, {"min_shards": 5, "max_shards": 2}, {"num_shards": 5000}):
            with pytest.raises(InvalidRequest, match="shards"):
                await client.scale(**wrong)
        with pytest.raises(InvalidRequest, match="one of the expert shards e"):
            await client.drain("nobody")


async def test_another_host_needs_the_token(monkeypatch):
    monkeypatch.setattr(cluster_service, "is_local", lambda _peer: False)
    conductor = Recording()
    async with gateway(say("x"), topology=conductor) as world:
        for token in ("", "wrong"):
            async with AsyncClient(world.server.address, cluster_token=token) as client:
                with pytest.raises(Unauthenticated):
                    await client.scale(3)
        assert conductor.asked == []
        async with AsyncClient(world.server.address, cluster_token=TOKEN) as client:
            assert await client.scale(3) == "3 shards"


async def test_a_gateway_without_a_conductor_says_so():
    async with gateway(say("x"), topology=None) as world, AsyncClient(world.server.address) as client:
        with pytest.raises(Unavailable, match="Conductor"):
            await client.rebalance()


async def test_the_topology_tells_the_last_decisions():
    conductor = Recording()
    object.__setattr__(conductor.known, "decisions", (Decision(at=1.5, text="3 shards: asked for"),))
    async with gateway(say("x"), topology=conductor) as world, AsyncClient(world.server.address) as client:
        decisions = (await client.topology()).decisions
        assert [(d.at, d.text) for d in decisions] == [(1.5, "3 shards: asked for")]


@pytest.mark.parametrize("words", [["scale"], ["scale", "3", "--auto"], ["scale", "2", "--min", "1"]])
def test_the_command_line_refuses_what_makes_no_sense(words, capsys):
    assert cli.main([*words, "--address", "127.0.0.1:1"]) == 2
    assert "expected" in capsys.readouterr().err
