"""The cluster that `chaos.py` breaks: three Ray nodes on this host, a demo-model cluster on them, Redis beside it."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cluster.app import Cluster, stop_ray
from ..commands.serve import DEMO_MODEL
from ..config import NODE, CacheConfig, ClusterConfig, ExchangeConfig, NetworkConfig
from ..errors import Unavailable
from ..router.status import ClusterState, ProcessStatus
from .valkey import ValkeyProcess, free_port

NUM_NODES, NUM_ATTENTION, NUM_SHARDS = 3, 2, 4
NUM_EXPERTS = 32  # of the demo model: one redundant copy of each
HANG_S = 3.0  # after so long a silent peer breaks the epoch
SETTLE_S = 90.0
_LOGGED = 20  # leftovers named at most


class ChaosWorld:
    """`with` starts it and ends it, whatever happened to its parts meanwhile."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._stack = contextlib.ExitStack()
        self.port = free_port()
        self.nodes: list[Any] = []  # ray.cluster_utils nodes that may be killed; the head is not among them
        self.gateways = [f"{node_address(i)}:{self.port}" for i in range(NUM_NODES)]

    def __enter__(self) -> "ChaosWorld":
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        from ray.cluster_utils import Cluster as RayNodes

        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self.redis = ValkeyProcess(self._folder / "redis", "--appendonly", "yes")
        self._stack.callback(self.redis.kill)
        self.ray_nodes = RayNodes()
        self._stack.callback(self.ray_nodes.shutdown)
        with contextlib.chdir("/"):
            self._add_node(0)
            self.nodes = [self._add_node(i) for i in range(1, NUM_NODES)]
        config = ClusterConfig(
            model=str(DEMO_MODEL),
            num_attention_replicas=NUM_ATTENTION,
            num_expert_shards=NUM_SHARDS,
            num_redundant_experts=NUM_EXPERTS,
            num_gateways=NUM_NODES,
            gateway_per_node=True,
            redis_url=self.redis.url,
            network=NetworkConfig(interface=NODE, gateway_host=NODE, gateway_port=self.port),
            cache=CacheConfig(kv_memory_bytes=64 << 20),
            exchange=ExchangeConfig(timeout_base_s=HANG_S, timeout_per_row_s=0.0),
        )
        self.cluster = Cluster(config, ray_address=self.ray_nodes.address, progress=self._say)
        self._stack.callback(stop_ray)
        self.cluster.start()
        self._stack.callback(self.cluster.stop)

    def _add_node(self, index: int) -> Any:
        sizes = {"num_cpus": 8, "object_store_memory": 80 << 20, "include_dashboard": False}
        return self.ray_nodes.add_node(node_ip_address=node_address(index), **(sizes if index == 0 else _worker(sizes)))

    def replace_node(self, index: int) -> None:
        """End a node's raylet at once, with all that runs on it, and bring another one up at its address."""
        self.ray_nodes.remove_node(self.nodes[index], allow_graceful=False)
        with contextlib.chdir("/"):
            self.nodes[index] = self._add_node(index + 1)

    # ---- what is there

    def state(self) -> ClusterState | None:
        with contextlib.suppress(Unavailable):
            return self.cluster.state()
        return None

    def serving(self, role: str) -> list[ProcessStatus]:
        """Processes of a role that serve as far as the Conductor knows; [] while there is none."""
        state = self.state()
        if state is None:
            return []
        if role == "gateway":
            return [p for p in state.processes if p.role == role and p.state == "ready"]
        return [p for p in state.processes if p.role == role and p.name in state.ranks and p.state == "ready"]

    def not_settled(self) -> list[str]:
        """What is not as it was before the first request, once the cluster has had the time to settle."""
        deadline = time.monotonic() + SETTLE_S
        while (wrong := self._unsettled()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return wrong

    def _unsettled(self) -> list[str]:
        state = self.state()
        if state is None or not state.ready:
            return [f"the cluster is not whole: {state.summary if state else 'no Conductor'}"]
        wrong = []
        for role, count in (("attention", NUM_ATTENTION), ("expert", NUM_SHARDS), ("gateway", NUM_NODES)):
            found = [p.name for p in state.processes if p.role == role]
            if len(found) != count:
                wrong.append(f"{len(found)} {role} processes, {count} expected: {found}")
        for p in state.processes:
            if p.attention and (p.num_running or p.num_waiting or p.num_free_kv_blocks != p.num_kv_blocks):
                used = p.num_kv_blocks - p.num_free_kv_blocks
                wrong.append(f"{p.name}: {p.num_running} run, {p.num_waiting} wait, {used} KV blocks are taken")
        return wrong


def node_address(index: int) -> str:
    return f"127.0.0.{index + 2}"  # Ray takes 127.0.0.1 for the host's own address


def _worker(sizes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sizes.items() if name != "include_dashboard"}


def processes_now() -> set[tuple[int, str]]:
    """(pid, start time) of every process, and ("shm", name) of every shared-memory file."""
    found: set[tuple[int, str]] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                found.add((int(entry.name), (entry / "stat").read_text().rsplit(")", 1)[1].split()[19]))
    return found | {(0, path.name) for path in Path("/dev/shm").iterdir()}


def leftovers(before: set[tuple[int, str]], timeout_s: float = 30.0) -> list[str]:
    """Processes and shared memory of this run that are still there: those that carry our session, or our parent."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = [line for pid, mark in processes_now() - before if (line := _ours(pid, mark))]
        if not left or time.monotonic() > deadline:
            return left[:_LOGGED]
        time.sleep(0.5)


def _ours(pid: int, mark: str) -> str:
    if pid == 0:
        return f"/dev/shm/{mark}" if "ray" in mark or "plasma" in mark or "expertmesh" in mark else ""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
        if command and pid != os.getpid() and any(word in command for word in ("ray::", "raylet", "gcs_server")):
            return f"{pid} {command[:80]}"
    return ""
