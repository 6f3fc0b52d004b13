"""One host's part of a `ray up` cluster, ended when the cluster's Ray is: `expertmesh-host watch | upgrade | stop`.

Why: `ray down` on hosts of your own stops Ray on the head only. The other hosts' Ray waits a minute for it and then
leaves half of its processes behind, and whatever serves on it knows nothing. So each host runs this watcher beside
Ray. It starts the host's command (the head's: `expertmesh serve`), looks whether the head's Ray answers and this host's
raylet lives, and where that is over ends the command with all its children, then this host's Ray. `ray down` ends the
raylet first and then waits for processes that do not heed SIGTERM: the watcher's SIGKILL cuts that wait short."""

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PID_FILE = Path("~/expertmesh/host.pid").expanduser()
LOOK_S = 1.0
REFUSED_S = 5.0  # the head is there and its Ray is not: it was stopped
SILENT_S = 60.0  # the head does not answer at all: perhaps only the network; Ray itself waits as long
END_S = 15.0  # for the command to end in order
PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    parser = argparse.ArgumentParser(prog="expertmesh-host", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("stop", help="end this host's watcher, its command and Ray")
    actions.add_parser("upgrade", help="on the head: replace every process by one with the code that is installed now")
    watching = actions.add_parser("watch", help="run COMMAND while the head's Ray lives, then end everything")
    watching.add_argument("head", metavar="HOST:PORT")
    watching.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    arguments = parser.parse_args()
    if arguments.action == "watch":
        return watch(arguments.head, arguments.command)
    if arguments.action == "stop":
        stop()
        return 0
    watcher = running_watcher()
    if watcher is None or not watcher.children():
        print("nothing that can be upgraded runs on this host: it is not the head, or not up", file=sys.stderr)
        return 1
    for command in watcher.children():
        command.send_signal(signal.SIGUSR1)
    return 0


def stop() -> None:
    """Also the first thing that a start does: `ray up` on a running cluster begins anew."""
    if (watcher := running_watcher()) is not None:
        with contextlib.suppress(psutil.Error):
            watcher.terminate()
            watcher.wait(END_S + 5.0)
    stop_ray()


def running_watcher() -> psutil.Process | None:
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int(PID_FILE.read_text()))
        if "watch" in process.cmdline():  # not another process that has got its number
            return process
    return None


def watch(head: str, command: list[str]) -> int:
    """Until the head's Ray is gone or SIGTERM comes (which leaves Ray alone: `stop` ends it itself)."""
    asked_to_end: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: asked_to_end.append(number))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # what the command leaves behind becomes our child
    PID_FILE.parent.mkdir(parents=True, exist_ok=True)
    PID_FILE.write_text(str(os.getpid()))
    child = subprocess.Popen(command) if command else None
    gone, raylet = Absence(lambda: knock(head), clock=time.monotonic), own_raylet()
    while not asked_to_end and not gone() and not has_ended(raylet):
        if child is not None and child.poll() is not None:
            print(f"{command[0]} ended with {child.returncode}; Ray goes on", file=sys.stderr, flush=True)
            child = None
        time.sleep(LOOK_S)
    if not asked_to_end:
        whose = "this host's Ray" if has_ended(raylet) else f"the head's Ray ({head})"
        print(f"{whose} is gone: this host stops", file=sys.stderr, flush=True)
        stop_ray()
    end_children()
    PID_FILE.unlink(missing_ok=True)
    return 0


def own_raylet() -> psutil.Process | None:
    """The process that runs Ray's workers on this host, started just before the watcher."""
    return next((process for process in psutil.process_iter(["name"]) if process.info["name"] == "raylet"), None)


def has_ended(process: psutil.Process | None) -> bool:
    with contextlib.suppress(psutil.Error):
        return process is not None and not (process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return True


class Absence:
    """True once the head has refused for REFUSED_S, or has been silent for SILENT_S."""

    def __init__(self, look: Callable[[], str], *, clock: Callable[[], float]) -> None:
        self._look, self._clock = look, clock
        self._since: float | None = None

    def __call__(self) -> bool:
        answer = self._look()
        if answer == "there":
            self._since = None
            return False
        if self._since is None:
            self._since = self._clock()
        return self._clock() - self._since >= (REFUSED_S if answer == "refused" else SILENT_S)


def knock(head: str) -> str:
    """there, refused or silent."""
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=LOOK_S).close()
    except ConnectionRefusedError:
        return "refused"
    except OSError:
        return "silent"
    return "there"


def end_children() -> None:
    """SIGTERM, then SIGKILL for whatever is left, orphans included."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().children():
            process.terminate()
    psutil.wait_procs(psutil.Process().children(), timeout=END_S)
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=LOOK_S)


def stop_ray() -> None:
    """Ray's own command takes two seconds to find that there is nothing to stop, and each `ray up` begins with it."""
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    if not any(mark in line for line in lines for mark in ("ray::", "/ray/", "ray.util.client")):
        return
    ray = Path(sys.executable).parent / "ray"
    subprocess.run([str(ray), "stop", "--force"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)


if __name__ == "__main__":
    sys.exit(main())
