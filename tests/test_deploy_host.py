"""The watcher of a host: when it believes that the head's Ray is gone, and that it leaves nothing of its command."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from expertmesh.deploy.host import LOOK_S, REFUSED_S, SILENT_S, Absence, knock, stop_ray

ROOT = Path(__file__).resolve().parent.parent


def test_a_refusal_counts_soon_silence_late_and_an_answer_forgets_both():
    now, answer = [0.0], ["there"]
    gone = Absence(lambda: answer[0], clock=lambda: now[0])

    def after(seconds: float, what: str) -> bool:
        now[0] += seconds
        answer[0] = what
        return gone()

    assert not after(100.0, "there")
    assert not after(1.0, "refused")
    assert not after(REFUSED_S - 0.1, "refused")
    assert not after(0.0, "there")
    assert not after(1.0, "refused")
    assert after(REFUSED_S, "refused")
    assert not after(0.0, "there")
    assert not after(1.0, "silent")
    assert not after(SILENT_S - 0.1, "silent")
    assert after(0.1, "silent")


def test_knocking_tells_an_open_port_from_a_closed_one():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert knock(address) == "there"
    assert knock(address) == "refused"


def test_a_watcher_that_is_told_to_end_takes_its_command_and_its_orphans_with_it(tmp_path: Path):
    """The command starts a process in a session of its own, as the embedded Redis is one, and ignores SIGTERM."""
    with watcher_of(tmp_path) as watcher:
        watcher.send_signal(signal.SIGTERM)
        assert watcher.wait(timeout=60.0) == 0
    assert not (tmp_path / "stopped").exists(), "who asks a watcher to end ends Ray itself"


def test_a_watcher_ends_everything_when_the_raylet_of_its_host_ends(tmp_path: Path):
    """Before the head's port is closed: `ray down` waits for what the watcher kills."""
    with subprocess.Popen(["sleep", "600"]) as raylet, watcher_of(tmp_path, raylet.pid) as watcher:
        raylet.kill()  # nobody reads its end: a zombie has ended too
        assert watcher.wait(timeout=60.0) == 0
        assert (tmp_path / "stopped").exists()


def test_ray_is_not_told_to_stop_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch):
    lines, told = [["bash"], ["valkey-server", "127.0.0.1:1"], None], []
    monkeypatch.setattr(psutil, "process_iter", lambda _names: [SimpleNamespace(info={"cmdline": c}) for c in lines])
    monkeypatch.setattr(subprocess, "run", lambda command, **_: told.append(command[1:]))
    stop_ray()
    assert not told
    for words in (["ray::IDLE"], ["/venv/ray/core/src/ray/raylet/raylet"], ["python", "-m", "ray.util.client.server"]):
        lines.append(words)
        stop_ray()
        assert told.pop() == ["stop", "--force"]
        assert lines.pop() == words


@contextlib.contextmanager
def watcher_of(folder: Path, raylet: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """A watcher whose command runs; afterwards nothing of it is left. Where it would stop Ray it writes a file."""
    orphan = folder / "orphan"
    script = f"trap '' TERM; setsid sleep 600 & echo $! > {orphan}; while :; do sleep 0.1; done"
    code = f"""
import pathlib, psutil, sys
import expertmesh.deploy.host as host
host.END_S = 0.5
host.own_raylet = lambda: psutil.Process({raylet}) if {raylet} else None
host.stop_ray = pathlib.Path({str(folder / "stopped")!r}).touch
sys.exit(host.main())
"""
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        watch = [sys.executable, "-P", "-c", code, "watch", address]
        environment = {**os.environ, "HOME": str(folder), "PYTHONPATH": str(ROOT / ".link")}
        watcher = subprocess.Popen([*watch, "bash", "-c", script], env=environment)
        try:
            deadline = time.monotonic() + 60.0
            while not (orphan.exists() and orphan.read_text().strip()):
                assert time.monotonic() < deadline
                time.sleep(LOOK_S / 20)
            family = psutil.Process(watcher.pid).children(recursive=True)
            assert int(orphan.read_text()) in {process.pid for process in family}
            yield watcher
        finally:
            watcher.kill()
        assert not [process for process in family if process.is_running() and process.status() != "zombie"]
    assert not (folder / "expertmesh" / "host.pid").exists()
