"""Promise: what the README shows works. Its Python runs as it stands against the demo model; its command lines are run,
or, where they start a cluster or wait for a person, are at least understood."""

import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertmesh import cli
from expertmesh.bench.contract_tools import Reflection, command_lines
from expertmesh.bench.gateway_processes import GatewayPlan, GatewayProcess
from expertmesh.redis_server import EmbeddedRedis

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
DEFAULT = "127.0.0.1:50051"
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = [
    line.partition("  #")[0]
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
COMMANDS = [line for line in SHELL if line.startswith("expertmesh ")]
FOREIGN = [line for line in SHELL if line.startswith(("grpcurl", "buf"))]
NOT_RUN = ("serve", "chat", "plan", "make-checkpoint")  # a cluster (`make contract`), a person, no such folder, noise
NOT_RUN += ("scale", "drain", "rebalance")  # this gateway has no Conductor (`tests/test_elastic.py` has)
SHOWN = ("42", "Paris", "178377", "more events", "NOT_FOUND")  # something that each example must print


@pytest.fixture(scope="module")
def address(demo_engine: str) -> Iterator[str]:
    with EmbeddedRedis() as redis:
        gateway = GatewayProcess(GatewayPlan(demo_engine, redis.url))
        try:
            yield gateway.wait_ready()
        finally:
            gateway.kill()


def test_the_examples_are_found():
    assert (len(PYTHON), len(COMMANDS) >= 6, len(FOREIGN)) == (4, True, 3)


def test_every_python_example_runs_as_it_stands(address: str):
    shown = ""
    for source in PYTHON:
        assert DEFAULT in source
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(source.replace(DEFAULT, address), "README.md", "exec"), {"__name__": "__main__"})
        assert out.getvalue()
        shown += out.getvalue()
    assert [text for text in SHOWN if text not in shown] == []


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_run_or_understood(line: str, address: str, capsys: pytest.CaptureFixture[str]):
    words = shlex.split(line)[1:]
    cli.make_parser().parse_args(words)
    if words[0] in NOT_RUN or "--watch" in words:
        return
    assert cli.main([*words, "--address", address]) == 0
    out = capsys.readouterr().out
    if "--regex" in words:
        assert re.fullmatch(words[-1], out.strip())
    elif words[0] == "generate":
        assert "42" in (json.loads(out)["answer"] if "--json" in words else out)


@pytest.mark.parametrize("line", FOREIGN)
def test_every_call_without_our_client_is_answered(line: str, address: str):
    """By grpcurl or buf where one is here, else by generic reflection with what the line sends."""
    words = shlex.split(line)
    data = words[words.index("-d") + 1]
    method = "/".join(line.split("/")[-2:]).rpartition(" ")[2]
    for tool in (Reflection(), *command_lines()):
        answer = tool.call(address, method, json.loads(data))
        assert answer.code == "ok", answer.text
        assert answer.messages
