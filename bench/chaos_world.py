"""The cluster that `chaos.py` breaks: three Ray nodes on this host, a demo-model cluster on them, Redis beside it."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cluster.app import Cluster, stop_ray
from ..cluster.commands.serve import DEMO_MODEL
from ..config import NODE, CacheConfig, ClusterConfig, ExchangeConfig, NetworkConfig
from ..errors import Unavailable
from ..model_config import ModelConfig
from ..router.status import ClusterState, ProcessStatus
from .valkey import HOST, ValkeyProcess, free_port

NUM_NODES, NUM_ATTENTION, NUM_SHARDS = 3, 2, 4
NUM_EXPERTS = 32  # of the demo model: one redundant copy of each
HANG_S = 3.0  # after so long a silent peer breaks the epoch
START_S = 60.0
STARTS = 3  # a raylet gives up when its agents take 15 s to come, which they may under load
SETTLE_S = 90.0
_LOGGED = 20  # leftovers named at most


class ChaosWorld:
    """`with` starts it and ends it, whatever happened to its parts meanwhile."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._stack = contextlib.ExitStack()
        self.port = free_port()
        self.nodes: list[RayNode] = []
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
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self.redis = ValkeyProcess(self._folder / "redis", "--appendonly", "yes")
        self._stack.callback(self.redis.kill)
        self.gcs_store = ValkeyProcess(self._folder / "gcs", "--appendonly", "yes")
        self._stack.callback(self.gcs_store.kill)
        self.nodes = [RayNode(0, "", gcs_store=self.gcs_store)]  # the head: it has the control store (GCS)
        self._stack.callback(lambda: [node.kill() for node in reversed(self.nodes)])
        address = self.nodes[0].address
        # One after the other: two that start at once on a host take each other's names.
        for i in range(1, NUM_NODES):
            self.nodes.append(RayNode(i, address))
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


class RayNode:
    """A raylet and its helpers, at a loopback address of their own; `ray start --block` in a session of its own."""

    def __init__(self, index: int, head: str, *, gcs_store: ValkeyProcess | None = None) -> None:
        """`head`: host:port of the node to join; empty = this is the head, which keeps its control state in
        `gcs_store` where one is given. Returns when the node is up."""
        self._gcs_again: subprocess.Popen[bytes] | None = None  # a control store that was started again
        port = free_port()
        self.address = head or f"{node_address(index)}:{port}"
        where = ["--head", "--port", str(port), "--include-dashboard", "false", "--no-monitor"]
        if head:
            where = ["--address", head]
        command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", *where]
        if gcs_store is None:
            command.append("--block")  # which ends the node when a process of it ends
        environment = dict(os.environ)
        if gcs_store is not None:
            environment["RAY_REDIS_ADDRESS"] = f"{HOST}:{gcs_store.port}"
            environment["RAY_external_storage_namespace"] = f"chaos-{port}"
        command += ["--node-ip-address", node_address(index), "--num-cpus", "8", "--disable-usage-stats"]
        command += ["--object-store-memory", str(80 << 20), "--dashboard-agent-listen-port", str(free_port())]
        command += ["--include-log-monitor", "false"]  # nobody reads what it would send
        for _ in range(STARTS):
            if not (told := self._start(command, environment)):
                return
        raise RuntimeError(f"a Ray node did not start: {told}")

    def _start(self, command: list[str], environment: dict[str, str]) -> str:
        """Once; empty, or what it said where it is not up in time."""
        with tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd="/", env=environment, start_new_session=True
            )
            deadline = time.monotonic() + START_S
            while b"Ray runtime started" not in (text := _read(log)):
                if self._process.poll() or time.monotonic() > deadline:
                    self.kill()
                    return text.decode(errors="replace")[-2000:] or "it said nothing"
                time.sleep(0.1)
        return ""

    def kill_gcs(self) -> int:
        """SIGKILL to the control store's process; its pid. `start_gcs` brings it back as it was."""
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                words = (folder / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                pid = int(folder.name)
                if words[0].endswith(b"gcs_server") and (
                    os.getpgid(pid) == self._process.pid or (self._gcs_again and pid == self._gcs_again.pid)
                ):
                    environment = (folder / "environ").read_bytes().rstrip(b"\0").split(b"\0")
                    self._gcs = words, dict(line.split(b"=", 1) for line in environment)
                    os.kill(pid, signal.SIGKILL)
                    self._reap_gcs()
                    return pid
        raise RuntimeError("this node runs no control store")

    def start_gcs(self) -> None:
        command, environment = self._gcs
        quiet = subprocess.DEVNULL
        self._gcs_again = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet, cwd="/")

    def kill(self) -> None:
        """SIGKILL to all of the node's own processes; its workers end with their raylet."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reap_gcs()

    def _reap_gcs(self) -> None:
        if self._gcs_again is not None:
            self._gcs_again.kill()
            self._gcs_again.wait()
            self._gcs_again = None


def _read(log: Any) -> bytes:
    log.seek(0)
    found: bytes = log.read()
    return found


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
