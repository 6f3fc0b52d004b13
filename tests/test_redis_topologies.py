"""Promise: sessions and journals are the same on one node, over TLS, behind Sentinel and on a Cluster; a failover is
a pause; a URL that never will serve is refused at the start, by name and without its password."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import redis
from test_session import turn
from test_tls import make_certificate

from expertmesh.bench import valkey
from expertmesh.errors import ConfigError, NotFound, SessionConflict, SessionStoreUnavailable
from expertmesh.router.gateway.journal import Journal
from expertmesh.router.gateway.redis_connection import RedisConnection, shown
from expertmesh.router.gateway.session import SessionStore

T = TypeVar("T")
TOPOLOGIES = ("one", "tls", "sentinel", "cluster")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[valkey.ValkeyProcess]:
    with valkey.persistent(tmp_path_factory.mktemp("one")) as node:
        yield node


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[valkey.ValkeyProcess]]:
    with valkey.cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    for name, issuer in (("ca", ""), ("redis", "ca"), ("other-ca", "")):
        make_certificate(folder, name, issuer)
    return folder


@contextlib.asynccontextmanager
async def tls_before(port: int, certificates: Path) -> AsyncIterator[int]:
    """A port that speaks TLS before a server that does not (the embedded one is built without)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "redis.pem", certificates / "redis.key")

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(valkey.HOST, port)
        with contextlib.suppress(asyncio.CancelledError):  # the test ends
            await asyncio.gather(copy(reader, back), copy(there, writer))

    server = await asyncio.start_server(serve, valkey.HOST, 0, ssl=context)
    yield server.sockets[0].getsockname()[1]
    server.close()


@pytest.fixture(params=TOPOLOGIES)
async def url(
    request: pytest.FixtureRequest, one: valkey.ValkeyProcess, certificates: Path, tmp_path: Path
) -> AsyncIterator[str]:
    if request.param == "one":
        yield one.url
    elif request.param == "tls":
        async with tls_before(one.port, certificates) as port:
            yield f"rediss://localhost:{port}/0?ssl_ca_certs={certificates}/ca.pem"
    elif request.param == "sentinel":
        with valkey.sentinel(tmp_path) as (_, _, watcher):
            yield f"redis+sentinel://{valkey.HOST}:{watcher.port}/main"
    else:
        yield cluster_url(request.getfixturevalue("cluster"))


def cluster_url(nodes: list[valkey.ValkeyProcess]) -> str:
    return "redis+cluster://" + ",".join(f"{valkey.HOST}:{node.port}" for node in nodes[:2])


async def test_sessions_and_journals_do_the_same_on_every_kind(url: str):
    store, journal = SessionStore(url), Journal(url)
    await store.check()
    kind = url.partition(":")[0].replace("+", "-")
    names = [f"{kind}-{i}" for i in range(8)]  # on a Cluster they spread over its nodes
    for owner in ("", "alice"):
        versions = await asyncio.gather(*(store.commit(n, 0, turn(n, f"r-{n}"), owner=owner) for n in names))
        assert versions == [1] * len(names)
        for name in names:
            assert (await store.get(name, owner)).turns == (turn(name, f"r-{name}"),)
            assert await store.commit(name, 0, turn(name, f"r-{name}"), owner=owner) == 1
            with pytest.raises(SessionConflict):
                await store.commit(name, 0, turn(name, "other"), owner=owner)
        listed, token = await store.list(owner, page_size=len(names) - 2)
        rest, _ = await store.list(owner, page_token=token)
        assert {s.session_id for s in listed + rest} >= set(names)
        assert (await store.fork(names[0], "forked", owner)).version == 1
        await store.delete("forked", owner)
        with pytest.raises(NotFound):
            await store.get("forked", owner)

    assert all(await asyncio.gather(*(journal.begin("alice", n, n.encode()) for n in names)))
    for _ in range(2):  # sent again, since nobody knows whether it was written: in once
        assert all(await asyncio.gather(*(journal.append("alice", n, 1, 0, [b"x", b"y"]) for n in names)))
    for name in names:
        taken = await journal.take("alice", name)
        assert (taken.head, taken.fence, taken.outputs) == (name.encode(), 2, [b"x", b"y"])
        await store.delete(name)
        await store.delete(name, "alice")
    await journal.close()
    await store.close()


async def served(call: Callable[[], Awaitable[T]]) -> T:
    """The call's answer, asked for again while the store is away."""
    async with asyncio.timeout(90):
        while True:
            with contextlib.suppress(SessionStoreUnavailable):
                return await call()


async def test_a_failover_is_a_pause_and_no_turn_is_doubled(tmp_path: Path):
    with valkey.sentinel(tmp_path) as (primary, replica, watcher):
        url = f"redis+sentinel://{valkey.HOST}:{watcher.port}/main"
        store, journal = SessionStore(url, timeout_s=1.0), Journal(url)
        assert await served(lambda: journal.begin("", "r", b"head"))
        for i in range(3):
            await served(lambda i=i: store.commit("s", i, turn(request_id=f"r{i}")))
        with primary.client() as client:
            assert client.wait(1, 60_000) == 1  # the replica has them
        primary.kill()
        assert await served(lambda: store.commit("s", 3, turn(request_id="r3"))) == 4
        record = await served(lambda: store.get("s"))
        assert [t.request_id for t in record.turns] == ["r0", "r1", "r2", "r3"]
        with replica.client() as client:
            assert client.info("replication")["role"] == "master"
        assert await served(lambda: journal.append("", "r", 1, 0, [b"x"]))
        assert (await served(lambda: journal.take("", "r"))).outputs == [b"x"]
        await journal.close()
        await store.close()


async def test_on_a_cluster_with_a_node_away_the_sessions_of_the_others_are_served(cluster: list[valkey.ValkeyProcess]):
    store = SessionStore(cluster_url(cluster), timeout_s=0.5)
    names = [f"n{i}" for i in range(12)]
    for name in names:
        await served(lambda name=name: store.commit(name, 0, turn(name, name)))
    away = f"{valkey.HOST}:{cluster[2].port}"
    nodes = {n: store._redis.get_node_from_key(f"expertmesh:session:{{/{n}}}:meta").name for n in names}
    lost = [name for name in names if nodes[name] == away]
    assert 0 < len(lost) < len(names)
    cluster[2].pause()
    try:
        for name in names:
            if name in lost:
                with pytest.raises(SessionStoreUnavailable):
                    await store.open(name)
            else:  # a call may meet the client while it learns of the node
                assert (await served(lambda name=name: store.open(name))).version == 1
    finally:
        cluster[2].go_on()
    for name in names:
        assert (await served(lambda name=name: store.open(name))).version == 1
    await store.close()


async def test_a_wrong_kind_of_server_or_password_is_named_at_the_start(
    one: valkey.ValkeyProcess,
    cluster: list[valkey.ValkeyProcess],
    certificates: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    with valkey.persistent(tmp_path, "--requirepass", "right") as guarded:
        port = guarded.port
        for wrong in (guarded.url, f"redis://:bad@{valkey.HOST}:{port}/0"):
            with pytest.raises(ConfigError, match="a store that lets us in") as refused:
                await SessionStore(wrong).check()
            assert "bad" not in str(refused.value)
            with pytest.raises(SessionStoreUnavailable, match="refuses"):
                await SessionStore(wrong).open("s")
        await SessionStore(f"redis://:right@{valkey.HOST}:{port}/0").check()
        with redis.Redis(host=valkey.HOST, port=port, password="right") as client:
            client.acl_setuser("silent", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@all", "-info"])
            client.acl_setuser("mute", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@all", "-eval"])
            client.config_set("maxmemory-policy", "allkeys-lru")
            client.config_set("maxmemory", 1 << 30)
        await SessionStore(f"redis://silent:pw@{valkey.HOST}:{port}/0").check()
        with pytest.raises(ConfigError, match="NoPermission"):
            await SessionStore(f"redis://mute:pw@{valkey.HOST}:{port}/0").check()
        await SessionStore(f"redis://:right@{valkey.HOST}:{port}/0").check()
        assert "allkeys-lru" in caplog.text
    with pytest.raises(ConfigError, match="this is a Cluster's node"):
        await SessionStore(cluster[0].url).check()
    with pytest.raises(ConfigError, match="this is no Cluster's node"):
        await SessionStore(f"redis+cluster://{valkey.HOST}:{one.port}").check()
    async with tls_before(one.port, certificates) as tls_port:
        stranger = SessionStore(f"rediss://localhost:{tls_port}/0?ssl_ca_certs={certificates}/other-ca.pem")
        with pytest.raises(SessionStoreUnavailable, match="does not answer"):
            await stranger.open("s")
        await stranger.close()
    for away in ("redis://{}/0", "redis+cluster://{}", "redis+sentinel://{}/main"):
        store = SessionStore(away.format(f"{valkey.HOST}:1"), timeout_s=0.2)
        await store.check()  # it may come back
        with pytest.raises(SessionStoreUnavailable, match="does not answer") as caught:
            await store.open("s")
        assert caught.value.retry_after_s
        await store.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://h",
        "redis+x://h",
        "redis+sentinel://h:1",
        "redis+cluster://h/1",
        "redis+cluster://:1",
        "unix+cluster://h",
    ],
)
def test_a_url_that_names_no_store_is_refused(url: str):
    with pytest.raises(ConfigError, match="redis_url"):
        RedisConnection(url, max_connections=1, timeout_s=1.0)


def test_no_password_is_shown():
    assert shown("redis://u:pw@h:1/0") == "redis://u:***@h:1/0"
    assert shown("redis+sentinel://h/x?sentinel_password=pw&a=b") == "redis+sentinel://h/x?sentinel_password=***&a=b"
