"""`ray up deploy/cluster.yaml` on pseudo-hosts: the file as shipped, `ray` as installed, several hosts in namespaces.

A laptop and two hosts here; three, which fetch the model from the laptop, with load until the expert tier grows, in
`make ray-up-test`, whose log stands in docs/deploy.md. What differs from a real use: addresses, the ssh user, set-up
(hosts share this checkout's environment instead of installing the wheel) and a tiny model."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pseudo_hosts import PseudoHosts, unavailable

ROOT = Path(__file__).resolve().parent.parent
WHOLE = os.environ.get("RAY_UP_TEST") == "whole"
LOG = os.environ.get("RAY_UP_LOG", "")
LAPTOP, HEAD, WORKERS = "10.77.0.9", "10.77.0.1", ["10.77.0.2", "10.77.0.3"][: 2 if WHOLE else 1]
TOKEN = "between-members"
WEIGHTS = ("model.safetensors", "model.safetensors.part")
DEADLINE_S = 240.0
NOISE = re.compile(
    r"WARN|VINFO|VVINFO|To ensure this mount|^bash: |^\s*$|Loaded cached|re-running|Confirm|Requested|Writing"
)

WHY_NOT = unavailable()

pytestmark = [pytest.mark.timeout(900), pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]


class Transcript:
    """What was typed on the laptop and what came back, without colours and machine paths."""

    def __init__(self) -> None:
        self.began_at = time.monotonic()
        self.lines: list[str] = []

    def add(self, command: str, output: str, keep: int = 12) -> None:
        self.lines.append(f"[{time.monotonic() - self.began_at:5.1f} s] $ {command}")
        output = re.sub(r"\x1b\[[0-9;]*m", "", output)
        output = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\t", "", output)
        output = re.sub(r"/\S*em-hosts-\w+/[\d.]+/home", "~", output)
        kept = [line.rstrip() for line in output.splitlines() if not NOISE.search(line)]
        self.lines += kept if len(kept) <= keep else ["...", *kept[len(kept) - keep :]]

    def write(self) -> None:
        if LOG:
            Path(LOG).write_text("\n".join(self.lines) + "\n")
        print("\n".join(self.lines))


class Laptop:
    """Where `ray up` is typed, in a folder that looks like the checkout."""

    def __init__(self, hosts: PseudoHosts, model: Path) -> None:
        self.hosts, self.log = hosts, Transcript()
        project = hosts.home(LAPTOP) / "expertmesh"
        shutil.copytree(ROOT / "deploy" / "hosts", project / "deploy" / "hosts")
        self._write(project / "deploy" / "cluster.yaml", cluster_yaml())
        self._write(project / "deploy" / "hosts" / "serve.yaml", serve_yaml(model))
        roles = f'{HEAD} {{"gateway": 1}}\n* {{"gateway": 1, "attention": 1, "expert": 1}}\n'
        (project / "deploy" / "hosts" / "roles").write_text(roles)

    def type(self, command: str, *, keep: int = 12) -> str:
        try:
            output = self.hosts.run(LAPTOP, typed(command), timeout_s=DEADLINE_S)
        except subprocess.CalledProcessError as error:
            raise AssertionError(f"{command}\n{error.output}\n{self.explanation()}") from None
        self.log.add(command, output, keep)
        return output

    def answers(self, command: str) -> str:
        """Its output, or nothing where it fails; not in the log."""
        try:
            return self.hosts.run(LAPTOP, typed(command), timeout_s=60.0)
        except subprocess.CalledProcessError:
            return ""

    def until(self, what: str, holds: Callable[[], Any]) -> float:
        began_at = time.monotonic()
        while not holds():
            if time.monotonic() - began_at > DEADLINE_S:
                raise AssertionError(f"{what}: not within {DEADLINE_S:.0f} s\n{self.explanation()}")
            time.sleep(0.5)
        waited_s = time.monotonic() - began_at
        self.log.lines.append(f"[{time.monotonic() - self.log.began_at:5.1f} s] {what} ({waited_s:.1f} s)")
        return waited_s

    def explanation(self) -> str:
        logs = "/tmp/ray/session_latest/logs"
        head = f"tail -n 30 ~/expertmesh/*.log {logs}/monitor.log 2>&1 || true"
        others = f"tail -n 12 {logs}/serve/replica_*.log {logs}/worker-*.err 2>&1 || true"
        told = [self.answers(f"expertmesh status --address {HEAD}:50051 --token {TOKEN}")]
        told += [self.hosts.run(host, f"bash -c '{others}'")[-4000:] for host in WORKERS]
        return "\n".join([*told, self.hosts.run(HEAD, f"bash -c '{head}'")])

    @staticmethod
    def _write(path: Path, content: dict[str, Any]) -> None:
        path.write_text(yaml.safe_dump(content))


def typed(command: str) -> str:
    return f". ~/.bashrc && cd ~/expertmesh && {command}"


def cluster_yaml() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "cluster.yaml").read_text())
    config["provider"] |= {"head_ip": HEAD, "worker_ips": WORKERS}
    config["auth"] = {"ssh_user": "root"}
    del config["file_mounts"]["~/expertmesh/dist"]
    config["setup_commands"] = [f"ln -sfn {sys.prefix} ~/expertmesh/venv"]
    return config


def serve_yaml(model: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "hosts" / "serve.yaml").read_text())
    config |= {"model": f"http://{LAPTOP}:8080" if WHOLE else str(model), "num_expert_shards": 1}
    config["network"]["cluster_token"] = TOKEN
    quick = {"target_busy": 0.02, "upscale_delay_s": 0.5, "downscale_delay_s": 1.0, "cooldown_s": 1.0}
    config["autoscaling"] = {"max_expert_shards": 2, **quick} if WHOLE else {}
    return config


def test_ray_up_serves_on_every_host_and_ray_down_leaves_nothing(tiny_checkpoint: Path):
    environment = {"PYTHONPATH": str(ROOT / ".link"), "OMP_NUM_THREADS": "1"}
    environment |= {"RAY_worker_niceness": "0", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}  # Ray's monitor looks every 5 s
    with PseudoHosts([LAPTOP, HEAD, *WORKERS], environment=environment) as hosts:
        laptop = Laptop(hosts, tiny_checkpoint)
        try:
            serve_files(laptop, tiny_checkpoint)
            bring_up(laptop)
            generate_everywhere(laptop)
            if WHOLE:
                grow_and_shrink(laptop)
            bring_down(laptop)
        finally:
            laptop.log.write()


def bring_up(laptop: Laptop) -> None:
    laptop.type("RAY_AUTH_MODE=token ray get-auth-token --generate > /dev/null 2>&1")
    laptop.type("ray up --yes --no-config-cache deploy/cluster.yaml", keep=4)
    served = laptop.hosts.home(HEAD) / "expertmesh" / "serve.log"
    laptop.until("serve.log on the head says ready", lambda: "ready: gRPC on" in served.read_text())
    laptop.log.lines += ["serve.log:", *served.read_text().splitlines()]


def serve_files(laptop: Laptop, folder: Path) -> None:
    if WHOLE:
        script = ROOT / "tests" / "file_server.py"
        laptop.hosts.run(LAPTOP, typed(f"(setsid python3 {script} {folder} {LAPTOP} 8080 > /dev/null 2>&1 &)"))


def generate_everywhere(laptop: Laptop) -> None:
    """One gateway on each host, all at the one port, and all say the same."""
    gateways = {f"{host}:50051" for host in (HEAD, *WORKERS)}
    laptop.until("a gateway serves on every host", lambda: set(status(laptop)["gateways"]) == gateways)
    said = set()
    for gateway in sorted(gateways):
        command = f"expertmesh generate 'Who are you?' --max-tokens 8 --temperature 0 --address {gateway} --json"
        said.add(json.loads(laptop.type(command).strip().splitlines()[-1])["answer"])
    assert len(said) == 1
    if WHOLE:
        caches = {host: laptop.hosts.home(host) / ".cache" / "expertmesh" for host in (HEAD, *WORKERS)}
        sizes = {host: sum(p.stat().st_blocks * 512 for p in cache.rglob("*.*")) for host, cache in caches.items()}
        shown = ", ".join(f"{host} {size / 1e6:.1f} MB" for host, size in sizes.items())
        laptop.log.lines.append(f"in the hosts' caches: {shown}")
        weights = {host for host, cache in caches.items() for name in WEIGHTS if list(cache.rglob(name))}
        assert weights, "nobody fetched weights"
        assert HEAD not in weights, "the head has no replica and fetched weights"


def grow_and_shrink(laptop: Laptop) -> None:
    ask = f"expertmesh generate Go --max-tokens 400 --address {HEAD}:50051 > /dev/null 2>&1"
    enough = laptop.hosts.home(LAPTOP) / "enough"
    load = [laptop.hosts.popen(LAPTOP, typed(f"while [ ! -e {enough} ] && {ask}; do :; done")) for _ in range(2)]
    try:
        laptop.until("two clients ask without pause: a second expert shard serves", lambda: num_shards(laptop) == 2)
        laptop.type(f"expertmesh status --address {HEAD}:50051 --token {TOKEN}")
        assert all(process.poll() is None for process in load), "a request failed while the tier grew"
    finally:
        enough.touch()
        for process in load:
            process.wait(timeout=DEADLINE_S)
    laptop.until("nobody asks: one expert shard serves", lambda: num_shards(laptop) == 1)


def bring_down(laptop: Laptop) -> None:
    laptop.type("ray down --yes deploy/cluster.yaml", keep=3)
    hosts = laptop.hosts
    laptop.until("no process is left on any host", lambda: not any(map(hosts.processes, (HEAD, *WORKERS))))


def status(laptop: Laptop) -> dict[str, Any]:
    lines = laptop.answers(f"expertmesh status --address {HEAD}:50051 --token {TOKEN} --json").strip().splitlines()
    return json.loads(lines[-1]) if lines else {"gateways": [], "members": []}


def num_shards(laptop: Laptop) -> int:
    return sum(member["expert"] and member["state"] == "ready" for member in status(laptop)["members"])
