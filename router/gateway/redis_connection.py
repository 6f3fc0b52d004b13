"""Which Redis keeps the records, by one URL, and every way of its failing as one typed error.

    redis://[user:password@]host:6379[/db]      one node; unix:///path/redis.sock; rediss://... over TLS
    redis+sentinel://h1:26379,h2:26379/name     the primary called `name`, as the sentinels know it now
    redis+cluster://h1:6379,h2:6379             a Cluster; the nodes named are where it is found

`rediss+sentinel` and `rediss+cluster` are the same over TLS. Behind a `?` stand options of redis-py, such as
`ssl_ca_certs=/etc/redis/ca.pem`; `sentinel_username` and `sentinel_password` are for the sentinels.

Scripts are sent whole (EVAL): on a Cluster, and after a failover, no server need know them before. Calls are repeated
after a doubt only by those who made them, so every script that writes must bear being run twice."""

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit, urlunsplit

import redis.asyncio as redis
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ConstantBackoff
from redis.exceptions import (
    AuthenticationError,
    ClusterError,
    NoPermissionError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

from ...errors import ConfigError, SessionStoreUnavailable

T = TypeVar("T")
FORMS = "redis://, rediss:// or unix://, or redis[s]+sentinel://hosts/name, or redis[s]+cluster://hosts"
REFUSED_RETRY_S = 5.0
_CLUSTER_RETRY = (3, 0.1)  # attempts of one call on a Cluster, each after so many seconds: slots move
_PASSING = (ClusterError, ReadOnlyError)  # answers of a server that is about to serve again, or no longer to be asked
_log = logging.getLogger(__name__)


class RedisConnection:
    """Connections to one store. At most `max_connections` calls are under way, the others wait; nothing is dialled
    before the first. A call ends after twice `timeout_s` seconds, whatever happens."""

    def __init__(self, url: str, *, max_connections: int, timeout_s: float) -> None:
        """ConfigError: the URL names no store."""
        self.url, self._timeout_s = url, timeout_s
        self._slots = asyncio.Semaphore(max_connections)
        try:
            self.client, self._others = _connect(url, timeout_s)
        except (ValueError, TypeError, RedisError) as error:
            raise ConfigError("redis_url", shown(url), f"{FORMS} ({error})") from None

    async def eval(self, script: str, keys: Sequence[str], arguments: Sequence[Any] = ()) -> Any:
        return await self.answered(self.client.eval(script, len(keys), *keys, *arguments))

    async def answered(self, call: Awaitable[T]) -> T:
        """The call's answer; whatever goes wrong with Redis is SessionStoreUnavailable."""
        try:
            async with asyncio.timeout(2 * self._timeout_s), self._slots:
                if isinstance(self.client, redis.RedisCluster):
                    await self.client.initialize()  # before it knows the slots, redis-py asks any node
                return await call
        except (RedisError, RedisClusterException, OSError, TimeoutError) as error:
            raise failure(error) from error
        finally:
            if inspect.iscoroutine(call):
                call.close()  # one that had no turn

    async def check(self) -> None:
        """ConfigError where the store answers and will never serve: a wrong password, no right to run scripts, another
        kind of server than the URL says. One that is away may come back: that is only noted."""
        try:
            async with asyncio.timeout(2 * self._timeout_s):
                if "+cluster" not in urlsplit(self.url).scheme:
                    await self._check_node()
                await self.client.eval("return 1", 0)
        except _PASSING as error:
            _log.warning("the session store is not there yet: %s", _short(error))
        except (AuthenticationError, ResponseError) as error:
            raise ConfigError("redis_url", shown(self.url), f"a store that lets us in: {_short(error)}") from None
        except RedisClusterException as error:
            if "Cluster mode is not enabled" in str(error):
                raise ConfigError(
                    "redis_url", shown(self.url), "redis://..., since this is no Cluster's node"
                ) from None
            _log.warning("the session store is not there yet: %s", _short(error))
        except (RedisError, OSError, TimeoutError) as error:
            _log.warning("the session store is not there yet: %s", _short(error))

    async def _check_node(self) -> None:
        """What a server says of itself, where we may ask."""
        try:
            info = await self.client.info()
        except NoPermissionError:
            return
        if info.get("cluster_enabled"):
            raise ConfigError("redis_url", shown(self.url), "redis+cluster://..., since this is a Cluster's node")
        if info.get("maxmemory") and info.get("maxmemory_policy") != "noeviction":
            policy = info.get("maxmemory_policy")
            _log.warning(
                "the session store drops sessions when it is full (%s); noeviction refuses turns instead", policy
            )

    async def close(self) -> None:
        for client in (self.client, *self._others):
            await client.aclose()
            if isinstance(client, redis.Redis):
                await client.connection_pool.disconnect()


def check_store(url: str) -> None:
    """ConfigError where this URL will never do, said before anything is started; empty = an embedded server."""

    async def check() -> None:
        connection = RedisConnection(url, max_connections=1, timeout_s=2.0)
        await connection.check()
        await connection.close()

    if url:
        asyncio.run(check())


def failure(error: BaseException) -> SessionStoreUnavailable:
    """What it means to those who asked. A refusal is for an operator to mend: it is retried later."""
    if isinstance(error, AuthenticationError | ResponseError) and not isinstance(error, _PASSING):
        text = f"the session store refuses: {_short(error)}"
        return SessionStoreUnavailable(text, retry_after_s=REFUSED_RETRY_S)
    return SessionStoreUnavailable(f"the session store does not answer ({_short(error)}); try again")


def shown(url: str) -> str:
    """Without the passwords, which must not reach a log."""
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    if at:
        user = user.partition(":")[0]
        hosts = f"{user}:***@{hosts}"
    query = "&".join(
        f"{name}=***" if "password" in name else f"{name}{equals}{value}"
        for name, equals, value in (option.partition("=") for option in parts.query.split("&"))
    )
    return urlunsplit(parts._replace(netloc=hosts, query=query))


def _connect(url: str, timeout_s: float) -> tuple[Any, list[Any]]:
    """The client, and others that end with it."""
    parts = urlsplit(url)
    scheme, _, kind = parts.scheme.partition("+")
    if scheme not in ("redis", "rediss", "unix") or (kind and scheme == "unix"):
        raise ValueError(f"there is no scheme {parts.scheme!r}")
    common: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    if kind == "sentinel":
        return _by_sentinel(scheme, parts, common)
    if kind == "cluster":
        return _to_cluster(scheme, parts, common), []
    if kind:
        raise ValueError(f"there is no scheme {parts.scheme!r}")
    pool = redis.ConnectionPool.from_url(url, max_connections=1 << 20, **common)
    return redis.Redis(connection_pool=pool), []


def _by_sentinel(scheme: str, parts: SplitResult, common: dict[str, Any]) -> tuple[Any, list[Any]]:
    hosts, options = _hosts(scheme, parts, default_port=26379)
    name, _, db = parts.path.strip("/").partition("/")
    if not name:
        raise ValueError("the name of the primary is missing behind the sentinels")
    own = {k.removeprefix("sentinel_"): options.pop(k) for k in list(options) if k.startswith("sentinel_")}
    tls = {k: v for k, v in options.items() if k.startswith("ssl")}
    sentinel = Sentinel(hosts, sentinel_kwargs={**common, **tls, **own}, **common)
    client = sentinel.master_for(name, db=int(db or 0), max_connections=1 << 20, **options)
    return client, sentinel.sentinels


def _to_cluster(scheme: str, parts: SplitResult, common: dict[str, Any]) -> Any:
    hosts, options = _hosts(scheme, parts, default_port=6379)
    if parts.path.strip("/"):
        raise ValueError("a Cluster has one database, 0: nothing stands behind its hosts")
    attempts, pause_s = _CLUSTER_RETRY
    return redis.RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in hosts],
        require_full_coverage=False,  # a part without an owner stops its own sessions only
        max_connections=1 << 20,
        retry=Retry(ConstantBackoff(pause_s), attempts),
        **common,
        **options,
    )


def _hosts(scheme: str, parts: SplitResult, *, default_port: int) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    """`host:port` pairs, and the options of a connection as redis-py reads them from an URL."""
    user, _, hosts = parts.netloc.rpartition("@")
    found = []
    for text in hosts.split(","):
        host, _, port = text.rpartition(":") if ":" in text.rpartition("]")[2] else (text, "", "")
        if not host:
            raise ValueError(f"{text!r} is no host:port")
        found.append((host.strip("[]"), int(port or default_port)))
    options = dict(parse_url(urlunsplit((scheme, f"{user}@x" if user else "x", "", parts.query, ""))))
    if options.pop("connection_class", None) is SSLConnection:
        options["ssl"] = True
    for name in ("host", "port", "db"):
        options.pop(name, None)
    return found, options


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]
