"""The embedded Redis server: real process, bounded, private, gone afterwards."""

from pathlib import Path

import psutil
import pytest
import redis

from expertmesh.redis_server import EmbeddedRedis, redis_url, resolve_url


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


def test_stop_twice_is_harmless():
    server = EmbeddedRedis()
    server.stop()
    server.stop()


def test_configuration_wins_over_environment_and_both_over_the_embedded_server():
    environ = {"REDIS_URL": "redis://environment:1/0"}
    assert resolve_url("redis://configured:1/0", environ) == "redis://configured:1/0"
    assert resolve_url("", environ) == "redis://environment:1/0"
    with redis_url("", environ) as url:
        assert url == "redis://environment:1/0"
    with redis_url("", {}) as url, redis.Redis.from_url(url) as client:
        assert client.ping()
