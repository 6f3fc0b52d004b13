"""Several hosts on one machine: each has its own address, PIDs, host name, home folder, /tmp/ray and /dev/shm.

A world is one network namespace with nothing but a loopback that carries the hosts' addresses, so nothing in it reaches
the machine's own network. A host is a PID, mount and UTS namespace in it, whose process 1 is this file: it runs the
commands that `ssh` brings and reaps what they leave behind. `ssh` and `rsync` on the hosts' PATH are this file too: no
daemon, no keys; the caller's stdin, stdout and stderr travel to the host over a unix socket. Everything else, `ray up`
included, is the real program. Needs root; `unavailable()` says why it cannot be."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

READY_S = 30.0
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")  # a test that is killed leaves no host behind
TOOLS = ("setpriv", "unshare", "nsenter", "ip", "mount", "tar", "bash")


def unavailable() -> str:
    """Why there can be no pseudo-hosts here; empty = there can."""
    import shutil

    if not sys.platform.startswith("linux"):
        return "pseudo-hosts are Linux namespaces"
    if os.geteuid() != 0:
        return "pseudo-hosts need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"pseudo-hosts need {', '.join(missing)}"
    trial = ["unshare", "-n", "-p", "-m", "-u", "-f", "--mount-proc", "bash", "-c"]
    done = subprocess.run([*trial, "ip link set lo up && mount -t tmpfs none /dev/shm"], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"namespaces are not permitted here: {done.stderr.strip()[:120]}"


class PseudoHosts:
    """`with PseudoHosts(["10.77.0.1", ...]) as hosts: hosts.run("10.77.0.1", "ray status")`."""

    def __init__(self, addresses: list[str], *, environment: Mapping[str, str] | None = None) -> None:
        self.addresses = addresses
        self._environment = dict(environment or {})
        self._holders: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "PseudoHosts":
        self.folder = Path(tempfile.mkdtemp(prefix="em-hosts-"))
        try:
            self._write_tools()
            network = self._network() + " && exec sleep infinity"
            world = subprocess.Popen([*DIES_WITH_US, "unshare", "-n", "bash", "-c", network])
            self._holders.append(world)
            look = ["nsenter", "-t", str(world.pid), "-n", "ip", "addr", "show", "to", self.addresses[-1]]
            self._wait(lambda: b"inet" in subprocess.run(look, capture_output=True).stdout)
            for address in self.addresses:
                self._start(address, world.pid)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        import shutil

        for holder in reversed(self._holders):  # a host's process 1 takes all others of its namespace with it
            holder.kill()
        for holder in self._holders:
            holder.wait(timeout=READY_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def home(self, address: str) -> Path:
        return self.folder / address / "home"

    def popen(self, address: str, command: str) -> subprocess.Popen[str]:
        """A shell command on a host, as `ssh` would run it."""
        ssh = [sys.executable, "-I", __file__, "ssh", f"root@{address}", command]
        environment = {**os.environ, "PSEUDO_HOSTS": str(self.folder)}
        return subprocess.Popen(
            ssh, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )

    def run(self, address: str, command: str, *, timeout_s: float = 120.0) -> str:
        """Its output; CalledProcessError with it where the command fails."""
        process = self.popen(address, command)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"{command!r} on {address} did not end in {timeout_s:.0f} s") from None
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, output)
        return output

    def processes(self, address: str) -> list[str]:
        """Command lines of what runs on a host, without the host's own process 1 and the one that looks."""
        lines = self.run(address, "for p in /proc/[0-9]*; do echo \"${p#/proc/} $(tr '\\0' ' ' < $p/cmdline)\"; done")
        found = [line.split(maxsplit=1) for line in lines.splitlines()]
        return [entry[1] for entry in found if len(entry) == 2 and entry[0] != "1" and "/proc/[0-9]" not in entry[1]]

    # ---- making them

    def _network(self) -> str:
        return " && ".join(["ip link set lo up", *(f"ip addr add {a}/32 dev lo" for a in self.addresses)])

    def _write_tools(self) -> None:
        tools = self.folder / "bin"
        tools.mkdir()
        for name in ("ssh", "rsync"):
            tool = tools / name
            tool.write_text(f'#!/bin/sh\nexec {sys.executable} -I {Path(__file__).resolve()} {name} "$@"\n')
            tool.chmod(0o755)

    def _start(self, address: str, world_pid: int) -> None:
        own = self.folder / address
        for name in ("home", "ray", "shm"):
            (own / name).mkdir(parents=True)
        environment = {
            "HOME": str(own / "home"),
            "PATH": f"{self.folder / 'bin'}:{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "PSEUDO_HOSTS": str(self.folder),
            "USER": "root",
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            **self._environment,
        }
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
        (own / "home" / ".bashrc").write_text(exports)  # a login shell's profile sets its own PATH first
        os.makedirs("/tmp/ray", exist_ok=True)
        prepare = " && ".join(
            [
                f"mount --bind {own / 'ray'} /tmp/ray",
                "mount -t tmpfs -o size=4g none /dev/shm",
                f"hostname host-{address.replace('.', '-')}",
                f"exec {sys.executable} -I {Path(__file__).resolve()} init {address} {own / 'socket'}",
            ]
        )
        namespaces = ["unshare", "-p", "-m", "-u", "-f", "--mount-proc", "--kill-child", "bash", "-c", prepare]
        command = [*DIES_WITH_US, "nsenter", "-t", str(world_pid), "-n", "--", *namespaces]
        self._holders.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL))
        self._wait(lambda: (own / "socket").exists())

    def _wait(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_S
        while not holds():
            if time.monotonic() > deadline or any(holder.poll() is not None for holder in self._holders):
                raise AssertionError("a pseudo-host did not start")
            time.sleep(0.02)


# ---------------------------------------------------------------- process 1 of a host


def init(address: str, path: str) -> None:
    """Run what is sent, reap everything. A connection brings three descriptors and a command, gets a status."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(64)
    os.rename(path + ".new", path)
    callers: dict[int, socket.socket] = {}
    lock = threading.Lock()
    threading.Thread(target=_accept, args=(listener, address, callers, lock), daemon=True).start()
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            time.sleep(0.02)
            continue
        with lock:
            caller = callers.pop(pid, None)
        if caller is not None:
            with contextlib.suppress(OSError):
                caller.sendall(str(os.waitstatus_to_exitcode(status) % 256).encode())
            caller.close()


def _accept(listener: socket.socket, address: str, callers: dict[int, socket.socket], lock: threading.Lock) -> None:
    while True:
        caller, _ = listener.accept()
        message, descriptors, _, _ = socket.recv_fds(caller, 1 << 20, 3)
        request = json.loads(message)
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)  # or what goes on in the background would hold the caller's pipes
        environment = {**os.environ, "SSH_CONNECTION": f"{request['from']} 40000 {address} 22"}
        actions = [(os.POSIX_SPAWN_DUP2, descriptor, number) for number, descriptor in enumerate(descriptors)]
        command = ["/bin/bash", "-c", request["command"]]
        with lock:  # the reaper must not see the child's end before its caller is known
            pid = os.posix_spawn("/bin/bash", command, environment, file_actions=actions, setsid=True)
            callers[pid] = caller
        for descriptor in descriptors:
            os.close(descriptor)


# ---------------------------------------------------------------- ssh and rsync


def ssh(arguments: list[str], stdin: int = 0, stdout: int = 1) -> int:
    """`ssh [options] USER@HOST COMMAND...`; options change nothing here."""
    rest = iter(arguments)
    target = ""
    for argument in rest:
        if argument in ("-i", "-o", "-p", "-L", "-l"):
            next(rest)
        elif not argument.startswith("-"):
            target = argument
            break
    address = target.rpartition("@")[2]
    command = " ".join(rest)
    own_address = os.environ.get("SSH_CONNECTION", "0.0.0.0 0 0.0.0.0 0").split()[2]
    with socket.socket(socket.AF_UNIX) as host:
        try:
            host.connect(str(Path(os.environ["PSEUDO_HOSTS"]) / address / "socket"))
        except OSError as error:
            print(f"ssh: connect to host {address}: {error}", file=sys.stderr)
            return 255
        message = json.dumps({"command": command, "from": own_address}).encode()
        socket.send_fds(host, [message], [stdin, stdout, 2])
        return int(host.recv(16) or b"255")


def rsync(arguments: list[str]) -> int:
    """`rsync --rsh SSH -avz [--exclude X] [--filter X] SOURCE... USER@HOST:TARGET` by tar; a copy, not a comparison."""
    rest = iter(arguments)
    places: list[str] = []
    for argument in rest:
        if argument in ("--rsh", "-e", "--exclude", "--filter"):
            next(rest)
        elif not argument.startswith("-"):
            places.append(argument)
    *sources, target = places
    address, _, folder = target.rpartition("@")[2].partition(":")
    for source in sources:
        path = Path(source)
        inside = source.endswith("/")
        base, name = (path, ".") if inside else (path.parent, path.name)
        if path.is_file() and not folder.endswith("/"):
            place = f"mkdir -p $(dirname {folder}) && cat > {folder} && chmod {path.stat().st_mode & 0o777:o} {folder}"
            with path.open("rb") as file:
                if code := ssh([f"root@{address}", place], stdin=file.fileno()):
                    return code
            continue
        with subprocess.Popen(["tar", "-C", str(base), "-cf", "-", name], stdout=subprocess.PIPE) as tar:
            assert tar.stdout is not None
            unpack = f"mkdir -p {folder} && tar -C {folder} -xf -"
            if code := ssh([f"root@{address}", unpack], stdin=tar.stdout.fileno()):
                return code
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "init":
        init(*sys.argv[2:])
    sys.exit({"ssh": ssh, "rsync": rsync}[sys.argv[1]](sys.argv[2:]))
