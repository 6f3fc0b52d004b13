"""The cluster that `chaos.py` breaks: Ray nodes on this host, a demo-model cluster on them, Redis beside it."""

import contextlib
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from ..cluster.app import Cluster, stop_ray
from ..cluster.commands.serve import DEMO_MODEL
from ..config import NODE, CacheConfig, ClusterConfig, ExchangeConfig, NetworkConfig
from ..errors import Unavailable
from ..model_config import ModelConfig
from ..router.status import ClusterState, ProcessStatus
from .ray_node import RayNode, node_address
from .valkey import ValkeyProcess, free_port

NUM_NODES, NUM_ATTENTION, NUM_SHARDS = 3, 2, 4
NUM_EXPERTS = 32  # of the demo model: one redundant copy of each
HANG_S = 3.0  # after so long a silent peer breaks the epoch
SETTLE_S = 90.0
_LOGGED = 20  # leftovers named at most


class ChaosWorld:
    """`with` starts it and ends it, whatever happened to its parts meanwhile."""

    def __init__(self, folder: Path, say: Callable[[str], None], *, num_nodes: int = NUM_NODES) -> None:
        self._folder, self._say, self._num_nodes = folder, say, num_nodes
        self._stack = contextlib.ExitStack()
        self.port = free_port()
        self.nodes: list[RayNode] = []
        self.gateways = [f"{node_address(i)}:{self.port}" for i in range(num_nodes)]

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
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self.redis = ValkeyProcess(self._folder / "redis", "--appendonly", "yes", "--appendfsync", "always")
        self._stack.callback(self.redis.kill)
        self.gcs_store = ValkeyProcess(self._folder / "gcs", "--appendonly", "yes")
        self._stack.callback(self.gcs_store.kill)
        self.nodes = [RayNode(0, "", gcs_store=self.gcs_store)]  # the head: it has the control store (GCS)
        self._stack.callback(lambda: [node.kill() for node in reversed(self.nodes)])
        address = self.nodes[0].address
        # One after the other: two that start at once on a host take each other's names.
        for i in range(1, self._num_nodes):
            self.nodes.append(RayNode(i, address))
        config = ClusterConfig(
            model=str(DEMO_MODEL),
            num_attention_replicas=NUM_ATTENTION,
            num_expert_shards=NUM_SHARDS,
            num_redundant_experts=NUM_EXPERTS,
            num_gateways=self._num_nodes,
            gateway_per_node=True,
            redis_url=self.redis.url,
            network=NetworkConfig(interface=NODE, gateway_host=NODE, gateway_port=self.port),
            cache=CacheConfig(kv_memory_bytes=64 << 20),
            exchange=ExchangeConfig(timeout_base_s=HANG_S, timeout_per_row_s=0.0),
        )
        model = ModelConfig.from_folder(DEMO_MODEL)
        self._copies = 2 * model.num_experts * len(model.moe_layer_ids)
        self.cluster = Cluster(config, ray_address=address, progress=self._say)
        self._stack.callback(stop_ray)
        self.cluster.start()
        self._stack.callback(self.cluster.stop)

    def replace_node(self, index: int) -> None:
        """End a node at once, with all that runs on it, and bring another one up at its address."""
        self.nodes[index].kill()
        self.nodes[index] = RayNode(index, self.nodes[0].address)

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

    def wait_whole(self) -> bool:
        """Until all processes serve and every expert has a redundant copy; False = not within the time."""
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            state, shards = self.state(), self.serving("expert")
            copies = sum(p.num_physical_experts for p in shards if state is not None and p.epoch == state.epoch)
            if state is not None and state.ready and len(shards) == NUM_SHARDS and copies >= self._copies:
                return True
            time.sleep(0.25)
        return False

    def num_returned(self) -> int:
        """Members that were given up and lived, since the Conductor's start."""
        state = self.state()
        return state.num_returned if state is not None else 0

    def _unsettled(self) -> list[str]:
        state = self.state()
        if state is None or not state.ready:
            return [f"the cluster is not whole: {state.summary if state else 'no Conductor'}"]
        wrong = []
        for role, count in (("attention", NUM_ATTENTION), ("expert", NUM_SHARDS), ("gateway", self._num_nodes)):
            found = [p.name for p in state.processes if p.role == role]
            if len(found) != count:
                wrong.append(f"{len(found)} {role} processes, {count} expected: {found}")
        for p in state.processes:
            if p.attention and (p.num_running or p.num_waiting or p.num_free_kv_blocks != p.num_kv_blocks):
                used = p.num_kv_blocks - p.num_free_kv_blocks
                wrong.append(f"{p.name}: {p.num_running} run, {p.num_waiting} wait, {used} KV blocks are taken")
        return wrong


_MARK = "EXPERTMESH_CHAOS"  # in the environment of every process of a run: another Ray on this host is none of it


def mark_processes() -> None:
    """What this process starts from now on, and what that starts, is known as this run's."""
    os.environ[_MARK] = secrets.token_hex(8)


def processes_now() -> set[tuple[int, str]]:
    """(pid, start time) of every process, and (0, name) of every shared-memory file."""
    found: set[tuple[int, str]] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                found.add((int(entry.name), (entry / "stat").read_text().rsplit(")", 1)[1].split()[19]))
    return found | {(0, path.name) for path in Path("/dev/shm").iterdir()}


def leftovers(before: set[tuple[int, str]], timeout_s: float = 30.0) -> list[str]:
    """Processes and shared memory of this run that are still there."""
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
        if f"{_MARK}={os.environ[_MARK]}".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            return f"{pid} {command[:80]}" if command else ""  # "": a zombie, which its parent has yet to read
    return ""
