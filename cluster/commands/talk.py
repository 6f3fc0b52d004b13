"""`expertmesh generate` and `expertmesh chat`: one answer, and a conversation kept by the cluster.

A turn of a session is resumable unless told otherwise: it needs Redis anyway, and a gateway that dies under it is then
no more than a pause. One answer without a session is not, so that it is served while Redis is away."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InvalidRequest
from .connect import add_connection, client_of

if TYPE_CHECKING:
    from ...router.client.requests import GenerateOptions


def add(commands: Any) -> None:
    generate_parser = commands.add_parser("generate", help="one answer to one prompt")
    generate_parser.description = "Stream one answer to stdout; figures go to stderr."
    generate_parser.add_argument("prompt", help='a user message; "-" reads stdin')
    generate_parser.add_argument(
        "--raw", action="store_true", help="take the prompt as plain text, without the chat template"
    )
    _add_options(generate_parser)
    form = generate_parser.add_mutually_exclusive_group()
    form.add_argument("--json-schema", metavar="FILE", help="the answer is JSON of this schema")
    form.add_argument("--regex", metavar="R", help="the answer matches this whole")
    form.add_argument("--choice", action="append", metavar="TEXT", help="the answer is one of these; once for each")
    generate_parser.add_argument(
        "--json", action="store_true", help="one JSON object: texts, finish reason, usage, times"
    )
    generate_parser.set_defaults(run=generate)

    chat_parser = commands.add_parser("chat", help="a conversation, kept by the cluster")
    chat_parser.description = (
        "Chat in the terminal. Ctrl-C cancels the turn, Ctrl-D leaves; /new begins another conversation."
    )
    _add_options(chat_parser)
    chat_parser.set_defaults(run=chat)


def generate(arguments: argparse.Namespace) -> int:
    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    from . import console

    options = _options(arguments, resumable=bool(arguments.session))
    if arguments.json_schema:
        options["json_schema"] = _text_of(Path(arguments.json_schema))
    if arguments.regex is not None:
        options["regex"] = arguments.regex
    if arguments.choice:
        options["choice"] = arguments.choice
    with client_of(arguments) as client:
        if arguments.raw:
            options["prompt"] = text
        options["session_id"] = arguments.session
        stream = client.generate("" if arguments.raw else text, **options)
        return console.generate(stream, as_json=arguments.json, out=sys.stdout, err=sys.stderr)


def chat(arguments: argparse.Namespace) -> int:
    from . import console

    with client_of(arguments) as client:
        client.topology()  # an address that nobody serves is said now, not after the first line
        session = client.session(arguments.session)
        options = _options(arguments, resumable=True)
        return console.chat(client, session, options, out=sys.stdout, err=sys.stderr)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest("--json-schema", str(path), f"a readable file ({error})") from None


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--session", metavar="ID", default="", help="continue this conversation")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="default: what the context allows")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 = greedy; default: the checkpoint's")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int, metavar="N", help="same seed, same text")
    parser.add_argument("--think", choices=("on", "off"), help="default: the model's own")
    parser.add_argument("--budget", type=int, metavar="N", help="tokens allowed for thinking")
    parser.add_argument(
        "--resumable", action=argparse.BooleanOptionalAction, help="survive the gateway (default: in a session)"
    )
    add_connection(parser)


def _options(arguments: argparse.Namespace, *, resumable: bool) -> "GenerateOptions":
    return {
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
        "thinking": arguments.think,
        "thinking_budget": arguments.budget,
        "resumable": resumable if arguments.resumable is None else arguments.resumable,
    }
