"""What an idle cluster costs: CPU of each of our processes over a minute, against an empty Serve replica beside them.

    python -P -m expertmesh.bench.idle [--seconds 60] [--model DIR]

Exits non-zero where a process uses more than 1 % of a core above the empty replica. Why against an empty replica: Ray's
own worker loop costs about 1 % of a core, which is not ours to save. The last line is JSON."""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from ray import serve

from ..client import Client
from ..cluster.app import Cluster
from ..config import CacheConfig, ClusterConfig, NetworkConfig
from ..make_checkpoint import make_checkpoint

LIMIT = 0.01  # of a core, above the empty replica
SETTLE_S = 5.0


@serve.deployment(ray_actor_options={"num_cpus": 0.01}, health_check_period_s=10.0, graceful_shutdown_wait_loop_s=0.1)
class Empty:
    """A Serve replica without anything of ours: the yardstick."""

    def pid(self) -> int:
        return os.getpid()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--model", help="checkpoint folder; default: a small random one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if not model:
            model = folder
            make_checkpoint(folder, "tiny-moe")
        figures = measure(model, arguments.seconds)
    print(json.dumps(figures))
    return 0 if figures["ok"] else 1


def measure(model: str, seconds: float) -> dict[str, object]:
    config = ClusterConfig(
        model=model,
        num_attention_replicas=2,
        num_expert_shards=2,
        network=NetworkConfig(gateway_port=0),
        cache=CacheConfig(kv_memory_bytes=16 << 20),
    )
    with Cluster(config, progress=lambda line: print(line, file=sys.stderr, flush=True)) as cluster:
        empty = serve.run(Empty.bind(), name="empty", route_prefix=None).pid.remote().result()
        with Client(list(cluster.gateways)) as client:  # once through everything: idle must also hold after work
            for _ in client.generate("warm", max_tokens=8, temperature=0.0):
                pass
        state = cluster.state()
        pids = {f"{p.role} {p.name}": p.pid for p in state.processes} | {"conductor": state.conductor_pid}
        time.sleep(SETTLE_S)
        used = _cpu_seconds({**pids, "empty": empty}, seconds)
        serve.delete("empty")
    return judge({name: used[name] / seconds for name in pids}, used["empty"] / seconds, seconds)


def judge(cores: dict[str, float], empty: float, seconds: float) -> dict[str, object]:
    """The figures and the verdict. `cores` = part of a core that each process used."""
    worst = max(cores, key=lambda name: cores[name])
    return {
        "bench": "idle",
        "seconds": seconds,
        "num_cores": os.cpu_count(),
        "empty_replica_percent": round(100 * empty, 2),
        "processes_percent": {name: round(100 * part, 2) for name, part in cores.items()},
        "worst": worst,
        "worst_above_empty_percent": round(100 * (cores[worst] - empty), 2),
        "limit_percent": 100 * LIMIT,
        "ok": cores[worst] - empty <= LIMIT,
    }


def _cpu_seconds(pids: dict[str, int], seconds: float) -> dict[str, float]:
    before = {name: _used(pid) for name, pid in pids.items()}
    time.sleep(seconds)
    return {name: _used(pid) - before[name] for name, pid in pids.items()}


def _used(pid: int) -> float:
    """User and system seconds of a process so far (Linux: fields 14 and 15 of its stat line, in clock ticks)."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
