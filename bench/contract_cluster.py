"""The cluster that `contract.py` talks to: `expertmesh serve` as a user starts it, and a Redis that keeps its data."""

import json
import subprocess
import sys
from pathlib import Path

from ..router.gateway.api_keys import hash_of, new_key
from .valkey import ValkeyProcess, free_port

START_S, STOP_S = 240.0, 90.0
OWNERS = ("alice", "bob")


class ServedCluster:
    """Two gateways, one attention replica, two expert shards, the demo model, API keys. `restart` ends every process of
    it, Redis included, and starts it on the same ports and data."""

    def __init__(self, folder: Path) -> None:
        self.keys = {owner: new_key() for owner in OWNERS}
        self._key_file = folder / "keys"
        self._key_file.write_text("".join(f"{owner} {hash_of(key)}\n" for owner, key in self.keys.items()))
        self._log = folder / "serve.log"
        self._redis = ValkeyProcess(folder / "redis", "--appendonly", "yes")
        self._port = free_port()
        self._process: subprocess.Popen[str] | None = None
        self.gateways: list[str] = []

    def __enter__(self) -> "ServedCluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stop()
        self._redis.kill()

    def restart(self) -> None:
        self._stop()
        self._redis.kill()
        self._redis.start()
        self._start()

    def _start(self) -> None:
        command = [
            sys.executable, "-P", "-m", "expertmesh.cli", "serve", "--json", "--gateways", "2",
            "--port", str(self._port), "--redis-url", self._redis.url,
            "--set", f"network.api_keys_file={self._key_file}",
        ]  # fmt: skip
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()  # serve ends by itself where it does not start
        if not line:
            raise SystemExit(f"the cluster did not start:\n{self._log.read_text()[-2000:]}")
        self.gateways = json.loads(line)["gateways"]

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
