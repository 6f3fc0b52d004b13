"""A gateway on every node that can hold one: the number that Serve is told as nodes come and go."""

from types import SimpleNamespace
from typing import Any

import pytest

from expertmesh.cluster import per_node
from expertmesh.cluster.per_node import LOOK_S, OnePerNode, nodes_for


def node(*resources: str, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": dict.fromkeys((*resources, "CPU"), 1.0)}


def test_the_number_follows_the_living_nodes_that_offer_the_role(monkeypatch: pytest.MonkeyPatch):
    nodes = [node("gateway"), node("gateway", "expert"), node("expert"), node("gateway", alive=False)]
    monkeypatch.setattr(per_node.ray, "nodes", lambda: nodes)
    assert (nodes_for("gateway"), nodes_for("expert"), nodes_for()) == (2, 2, 3)
    policy, state = OnePerNode("gateway"), None

    def asked_at(now: float) -> int:
        nonlocal state
        count, state = policy(SimpleNamespace(policy_state=state, current_time=now))
        return count

    assert asked_at(100.0) == 2
    nodes.append(node("gateway"))
    assert asked_at(100.0 + LOOK_S / 2) == 2, "the nodes are looked at in every turn of Serve's loop"
    assert asked_at(100.0 + LOOK_S) == 3
    nodes[:] = [node("expert")]
    assert asked_at(100.0 + 2 * LOOK_S) == 1, "never none: the node may come back"
