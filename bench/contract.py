"""The contract with clients, checked against a running cluster: `make contract` prints a table, all pass or exit 1.

`expertmesh serve` on the demo model (two gateways, one attention replica, two expert shards, API keys) beside a Redis
that keeps its data; grpcurl or buf through reflection, a generic reflection client, our clients and command line; then
every process of it is ended and started again. `--only NAME` runs one row. The last line is JSON."""

import argparse
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path

from .contract_checks import CHECKS, Contract
from .contract_cluster import ServedCluster
from .contract_tools import command_lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", default="", help="rows whose name has this in it")
    parser.add_argument("-v", "--verbose", action="store_true", help="where a row failed")
    arguments = parser.parse_args()
    started = time.perf_counter()
    failed: list[str] = []
    chosen = [(name, check) for name, check in CHECKS if arguments.only in name]
    with tempfile.TemporaryDirectory(prefix="expertmesh-contract-") as folder, ServedCluster(Path(folder)) as cluster:
        contract = Contract(cluster)
        for name, check in chosen:
            begun = time.perf_counter()
            try:
                word, detail = "pass", check(contract)
            except Exception as error:
                word, detail = "FAIL", f"{type(error).__name__}: {error}"
                failed.append(name)
                if arguments.verbose:
                    traceback.print_exc()
            print(f"{word}  {name:<22} {time.perf_counter() - begun:6.1f} s  {detail}", flush=True)
        contract.close()
    tools = [tool.name for tool in command_lines()]
    print(
        json.dumps(
            {
                "bench": "contract",
                "checks": len(chosen),
                "passed": len(chosen) - len(failed),
                "failed": failed,
                "tools": tools or "none here: generic reflection only",
                "total_s": round(time.perf_counter() - started, 1),
            }
        )
    )
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
