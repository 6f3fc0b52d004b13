"""`expertmesh sessions list | export | fork | delete`: the conversations that the cluster keeps."""

import argparse
import json
import sys
from datetime import UTC, datetime
from typing import Any

from .connect import add_connection, client_of


def add(commands: Any) -> None:
    parser = commands.add_parser("sessions", help="conversations: list, export, fork, delete")
    parser.description = "The conversations that the cluster keeps for this API key."
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_action(actions, "list", "ids, turns and ages", list_sessions).add_argument(
        "--json", action="store_true", help="one JSON object a line"
    )
    _add_action(actions, "export", "all of one as JSON: messages, token ids, settings", export, "SESSION")
    fork_parser = _add_action(actions, "fork", "another one that begins with its turns", fork, "SESSION", "NEW")
    fork_parser.add_argument("--at", type=int, metavar="N", default=0, help="take the first N turns (default: all)")
    _add_action(actions, "delete", "forget one", delete, "SESSION")


def list_sessions(arguments: argparse.Namespace) -> int:
    from . import console

    with client_of(arguments) as client:
        for session in client.list_sessions():
            if arguments.json:
                print(json.dumps(console.as_dict(session)))
            else:
                made = datetime.fromtimestamp(session.created_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
                print(f"{session.session_id:<24} {session.version:>5} turns   {made}")
    return 0


def export(arguments: argparse.Namespace) -> int:
    from . import console

    with client_of(arguments) as client:
        json.dump(console.as_dict(client.export_session(arguments.SESSION)), sys.stdout, ensure_ascii=False, indent=1)
        print()
    return 0


def fork(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        made = client.fork_session(arguments.SESSION, arguments.NEW, at_version=arguments.at)
    print(f"{made.session_id}: {made.version} turns")
    return 0


def delete(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        client.delete_session(arguments.SESSION)
    return 0


def _add_action(actions: Any, name: str, help: str, run: Any, *positional: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=help, description=help)
    for argument in positional:
        parser.add_argument(argument)
    add_connection(parser)
    parser.set_defaults(run=run)
    return parser
