"""A Ray node of this host at a loopback address of its own. Its parts can be killed: raylet, helpers, control store."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .valkey import HOST, ValkeyProcess, free_port

START_S = 60.0
STARTS = 3  # a raylet gives up when its agents take 15 s to come, which they may under load


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
