"""The command line: `expertmesh COMMAND`; each command is a file of `cluster/commands/` whose `add` makes its parser.

Heavy modules are imported inside the commands, so that `--help` answers at once. What a machine reads goes to stdout,
progress and errors to stderr. Exit codes: 0 done, 1 it failed (one line says why), 2 wrong usage, 130 interrupted."""

import argparse
import os
import sys
from collections.abc import Sequence

from .cluster.commands import checkpoint, operate, plan, serve, sessions, status, talk
from .errors import ConfigError, ExpertMeshError, InvalidRequest

COMMANDS = (serve, talk, sessions, status, operate, plan, checkpoint)  # in the order of --help
EPILOG = """\
examples:
  expertmesh serve --model /models/Qwen3-30B-A3B --attention 2 --shards 4
  expertmesh chat
  expertmesh generate "What is 17 * 23?" --think off
  expertmesh sessions list
  expertmesh status --watch 2
  expertmesh scale 4
  expertmesh plan /models/Qwen3-235B-A22B-FP8 --gpu H200:141 -n 2
  expertmesh make-checkpoint --config config.json --out /tmp/tiny
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except (ConfigError, InvalidRequest) as error:
        print(f"expertmesh: {error}", file=sys.stderr)
        return 2
    except ExpertMeshError as error:
        print(f"expertmesh: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `expertmesh generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="expertmesh",
        description="A serving cluster for Qwen3 mixture-of-experts models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
