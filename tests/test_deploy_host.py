"""The watcher of a host: when it believes that the head's Ray is gone, and that it leaves nothing of its command."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from expertmesh.deploy.host import LOOK_S, REFUSED_S, SILENT_S, Absence, knock

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
    orphan = tmp_path / "orphan"
    script = f"trap '' TERM; setsid sleep 600 & echo $! > {orphan}; while :; do sleep 0.1; done"
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        code = "import expertmesh.deploy.host as host, sys; host.END_S = 0.5; sys.exit(host.main())"
        watch = [sys.executable, "-P", "-c", code]
        environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT / ".link")}
        watcher = subprocess.Popen([*watch, "watch", address, "bash", "-c", script], env=environment)
        try:
            deadline = time.monotonic() + 60.0
            while not (orphan.exists() and orphan.read_text().strip()):
                assert time.monotonic() < deadline
                time.sleep(LOOK_S / 20)
            family = psutil.Process(watcher.pid).children(recursive=True)
            assert int(orphan.read_text()) in {process.pid for process in family}
            watcher.send_signal(signal.SIGTERM)
            assert watcher.wait(timeout=60.0) == 0
        finally:
            watcher.kill()
        assert not [process for process in family if process.is_running() and process.status() != "zombie"]
    assert not (tmp_path / "expertmesh" / "host.pid").exists()
