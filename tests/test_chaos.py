"""A minute of `make chaos`: a process of each kind is killed under streams of the demo model, and nobody notices."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.ray
KINDS = ("shard-kill", "attention-kill", "gateway-kill", "conductor-kill", "serve-controller-kill", "redis-kill")


def run_and_end(command: list[str], timeout_s: float) -> tuple[int, str]:
    """Exit code and output. Past its time it is asked to end, so that it ends what it started."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            told, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            told, _ = process.communicate(timeout=90.0)
            told += f"ended after {timeout_s:g} s"
        return process.returncode, told


@pytest.mark.timeout(600)
def test_a_fault_of_each_kind_changes_no_token_and_leaves_nothing_behind():
    command = [sys.executable, "-P", "-m", "expertmesh.bench.chaos", "--minutes", "0.2", "--measured", "0"]
    command += ["--streams", "64", "--requests", "16", "--nodes", "2", "--pause", "1.5", "3", "--only", ",".join(KINDS)]
    code, told = run_and_end(command, timeout_s=480.0)
    assert code == 0, told[-3000:]
    figures = json.loads(next(line for line in reversed(told.splitlines()) if line.startswith("{")))
    assert figures["identical"] == figures["complete"] == figures["streams"] >= 64
    assert figures["left"] == []
    assert set(figures["faults"]) == set(KINDS)
    assert all(count >= 1 for count in figures["faults"].values()), figures["faults"]
