"""A minute of `make chaos`: processes of every kind are killed under streams of the demo model, and nobody notices."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.ray
KINDS = ("shard-kill", "attention-kill", "gateway-kill", "conductor-kill", "serve-controller-kill", "redis-kill")


@pytest.mark.timeout(420)
def test_a_minute_of_faults_changes_no_token_and_leaves_nothing_behind():
    command = [sys.executable, "-P", "-m", "expertmesh.bench.chaos", "--minutes", "0.7", "--streams", "64"]
    run = subprocess.run(
        [*command, "--requests", "32", "--only", ",".join(KINDS)], capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    figures = json.loads(run.stdout.splitlines()[-1])
    assert figures["identical"] == figures["complete"] == figures["streams"] >= 64
    assert figures["left"] == []
    assert sum(figures["faults"].values()) >= 4
