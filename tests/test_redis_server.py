"""The embedded Redis server: real process, bounded, private, gone afterwards."""

import signal
from pathlib import Path

import psutil
import pytest
import redis

from expertmesh.redis_server import EmbeddedRedis, resolve_url


def test_embedded_server_answers_on_a_private_socket_and_leaves_nothing_behind():
    children = set(psutil.Process().children())
    with EmbeddedRedis(max_memory_bytes=64 << 20) as server:
        with redis.Redis.from_url(server.url) as client:
            client.set("key", "value")
            assert client.get("key") == b"value"
            config = client.config_get("*")
        socket = Path(server.url.removeprefix("unix://"))
        assert socket.parent.stat().st_mode & 0o077 == 0
    assert config["maxmemory"] == str(64 << 20)
    assert config["maxmemory-policy"] == "noeviction"
    assert (config["save"], config["appendonly"], config["port"]) == ("", "no", "0")
    assert not socket.parent.exists()
    assert set(psutil.Process().children()) == children


def test_server_on_an_interface_asks_for_its_password():
    with EmbeddedRedis(host="127.0.0.1") as server:
        with redis.Redis.from_url(server.url) as client:
            assert client.ping()
        bare = "redis://" + server.url.split("@")[1]
        with redis.Redis.from_url(bare) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()


def test_server_outlives_ctrl_c_in_the_terminal():
    others = set(psutil.Process().children())
    with EmbeddedRedis() as server, redis.Redis.from_url(server.url) as client:
        (process,) = set(psutil.Process().children()) - others
        process.send_signal(signal.SIGINT)
        assert client.ping()
        blocked = next(
            x for x in Path(f"/proc/{process.pid}/status").read_text().splitlines() if x.startswith("SigBlk")
        )
        assert int(blocked.split()[1], 16) >> (signal.SIGINT - 1) & 1


def test_stop_twice_is_harmless():
    server = EmbeddedRedis()
    server.stop()
    server.stop()


def test_configuration_wins_over_the_environment():
    environ = {"REDIS_URL": "redis://environment:1/0"}
    assert resolve_url("redis://configured:1/0", environ) == "redis://configured:1/0"
    assert resolve_url("", environ) == "redis://environment:1/0"
    assert resolve_url("", {}) == ""  # an embedded one is started
