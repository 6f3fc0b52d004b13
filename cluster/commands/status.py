"""`expertmesh status`: topology, health, KV and expert load, the last decisions. Exit code 1 where a gateway does not
serve."""

import argparse
import json
import sys
import time
from typing import Any

from .connect import add_connection, client_of, tls_of


def add(commands: Any) -> None:
    parser = commands.add_parser("status", help="topology, health, KV and expert load")
    parser.description = "Show the cluster. Exit code 1 where a gateway does not serve."
    add_connection(parser, cluster_token=True)
    parser.add_argument("--json", action="store_true", help="the topology as JSON")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="again and again, until interrupted")
    parser.set_defaults(run=status)


def status(arguments: argparse.Namespace) -> int:
    while True:
        code = show(arguments)
        if arguments.watch is None:
            return code
        time.sleep(max(0.1, arguments.watch))


def show(arguments: argparse.Namespace) -> int:
    """Once; 1 where a gateway does not serve."""
    from . import console

    with client_of(arguments) as client:
        topology = client.topology()
    tls = tls_of(arguments)
    health = {address: console.gateway_health(address, tls=tls) for address in topology.gateways}
    if arguments.json:
        print(json.dumps(console.topology_as_dict(topology, health)), flush=True)
    else:
        clear = "\x1b[2J\x1b[H" if arguments.watch is not None and sys.stdout.isatty() else ""
        print(clear + console.status_table(topology, health), flush=True)
    return 0 if health and all(state == "SERVING" for state in health.values()) else 1
