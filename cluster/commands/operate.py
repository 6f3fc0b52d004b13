"""`expertmesh scale | drain | rebalance`: what an operator asks of a running cluster."""

import argparse
from typing import Any

from ...errors import ConfigError
from .connect import add_connection, client_of


def add(commands: Any) -> None:
    scale = commands.add_parser("scale", help="another number of expert shards")
    scale.description = "A fixed number of expert shards, or --auto: the autoscaler's, within bounds. Streams go on."
    scale.add_argument("shards", nargs="?", type=int, default=0, metavar="N", help="so many from now on")
    scale.add_argument("--auto", action="store_true", help="as many as the load asks for")
    scale.add_argument("--min", type=int, default=0, metavar="N", help="with --auto: at least (default: as configured)")
    scale.add_argument("--max", type=int, default=0, metavar="N", help="with --auto: at most (default: as configured)")
    scale.set_defaults(run=run_scale)
    drain = commands.add_parser("drain", help="take one expert shard out in good order")
    drain.description = (
        "Move a shard's experts to the others, then end it; another shard starts in its place, on whatever node has "
        "room. Member ids are shown by `expertmesh status`. To keep fewer shards: `expertmesh scale N`."
    )
    drain.add_argument("member", metavar="MEMBER", help="for example expert-4mccnrx7#5eb0")
    drain.set_defaults(run=run_drain)
    rebalance = commands.add_parser("rebalance", help="place the experts anew by the load seen so far")
    rebalance.description = "Place the experts anew now, instead of when the skew of their loads asks for it."
    rebalance.set_defaults(run=run_rebalance)
    for parser in (scale, drain, rebalance):
        add_connection(parser, cluster_token=True)


def run_scale(arguments: argparse.Namespace) -> int:
    if arguments.auto == (arguments.shards > 0):
        raise ConfigError("scale", arguments.shards, "a positive number of shards, or --auto")
    if not arguments.auto and (arguments.min or arguments.max):
        raise ConfigError("--min, --max", (arguments.min, arguments.max), "bounds go with --auto")
    if min(arguments.min, arguments.max) < 0:
        raise ConfigError("--min, --max", (arguments.min, arguments.max), "not negative")
    with client_of(arguments) as client:
        print(client.scale(arguments.shards, min_shards=arguments.min, max_shards=arguments.max))
    return 0


def run_drain(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        print(client.drain(arguments.member))
    return 0


def run_rebalance(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        print(client.rebalance())
    return 0
