"""One gateway on every node, however many there are: which nodes count, and the policy that Serve asks for a number.

Like Serve's own proxies: clients dial any node at one fixed port. Serve spreads the replicas (`max_replicas_per_node`),
the policy only follows the nodes that come and go. Small, since it runs in Serve's controller."""

from typing import Any

import ray

LOOK_S = 2.0  # a look at the nodes costs a call to Ray's GCS; Serve asks ten times a second


class OnePerNode:
    """Serve's autoscaling policy: as many replicas as nodes that can hold one."""

    def __init__(self, resource: str = "", least: int = 1) -> None:
        self._resource, self._least = resource, least

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        state = dict(ctx.policy_state or {})
        now = float(ctx.current_time or 0.0)
        if "wanted" not in state or now - state["looked_at"] >= LOOK_S:
            state = {"wanted": max(self._least, nodes_for(self._resource)), "looked_at": now}
        return state["wanted"], state


def nodes_for(resource: str = "") -> int:
    """Living nodes that offer this resource; all of them where it is empty."""
    return sum(node["Alive"] and (not resource or resource in node["Resources"]) for node in ray.nodes())
