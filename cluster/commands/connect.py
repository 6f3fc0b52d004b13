"""How a command reaches a cluster: the options that all client commands have, and the client made from them."""

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...router.client.blocking import Client
    from ...router.gateway.tls import ClientTls

DEFAULT_ADDRESS = "127.0.0.1:50051"
TOKEN_VARIABLE = "EXPERTMESH_NETWORK__CLUSTER_TOKEN"
API_KEY_VARIABLE = "EXPERTMESH_API_KEY"


def add_connection(parser: argparse.ArgumentParser, *, cluster_token: bool = False) -> None:
    """`cluster_token`: for commands about the cluster itself."""
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--address", default=DEFAULT_ADDRESS, metavar="HOST:PORT", help=f"gateways, comma-separated ({DEFAULT_ADDRESS})"
    )
    group.add_argument("--api-key", metavar="KEY", default="", help=f"where gateways ask for one ({API_KEY_VARIABLE})")
    if cluster_token:
        group.add_argument("--token", default="", help=f"cluster token, from another host ({TOKEN_VARIABLE})")
    group.add_argument("--tls", action="store_true", help="the gateways speak TLS and have public certificates")
    group.add_argument("--tls-ca", metavar="FILE", default="", help="the CA (PEM) of the gateways' certificates")
    group.add_argument("--tls-cert", metavar="FILE", default="", help="own certificate, where gateways ask for one")
    group.add_argument("--tls-key", metavar="FILE", default="", help="its key")


def client_of(arguments: argparse.Namespace) -> "Client":
    from ...router.client.blocking import Client

    return Client(
        [a.strip() for a in arguments.address.split(",") if a.strip()],
        api_key=arguments.api_key or os.environ.get(API_KEY_VARIABLE, ""),
        cluster_token=getattr(arguments, "token", "") or os.environ.get(TOKEN_VARIABLE, ""),
        tls=tls_of(arguments),
    )


def tls_of(arguments: argparse.Namespace) -> "ClientTls | None":
    if not (arguments.tls or arguments.tls_ca or arguments.tls_cert or arguments.tls_key):
        return None
    from ...router.gateway.tls import ClientTls

    return ClientTls(ca_file=arguments.tls_ca, cert_file=arguments.tls_cert, key_file=arguments.tls_key)
