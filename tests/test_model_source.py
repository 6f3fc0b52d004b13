"""Weights over HTTP: only the ranges asked for, resumed, shared by processes, checked, and every failure typed."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from file_server import FileServer

from expertmesh.checkpoint import Checkpoint
from expertmesh.config import WeightsConfig
from expertmesh.errors import CheckpointError, ChecksumMismatch, DiskFull, DownloadFailed, ModelNotFound
from expertmesh.make_checkpoint import make_checkpoint
from expertmesh.model_source import model_folder, model_name, open_model, pinned
from expertmesh.remote_file import CHUNK_BYTES, Expected, RemoteFile
from expertmesh.router.gateway.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
MANY = 9 * CHUNK_BYTES + 12_345
CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "big").write_bytes(random.Random(1).randbytes(MANY))
    (folder / "empty").write_bytes(b"")
    with FileServer(folder) as server:
        yield server


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same float32 weights (9 MB) in one file, and in several under an index."""
    made = {"one": tmp_path_factory.mktemp("one"), "many": tmp_path_factory.mktemp("many")}
    make_checkpoint(made["one"], CONFIG, dtype="float32")
    make_checkpoint(made["many"], CONFIG, dtype="float32", max_shard_bytes=3 << 20)
    return made


def config_of(tmp_path: Path, **changes: object) -> WeightsConfig:
    return replace(WeightsConfig(cache_dir=str(tmp_path / "cache"), timeout_s=20.0), **changes)


def file_of(server: FileServer, tmp_path: Path, name: str = "big", **options: object) -> RemoteFile:
    config = options.pop("config", config_of(tmp_path))
    return RemoteFile(f"{server.url}/{name}", tmp_path / "cache" / name, config, sleep=lambda _s: None, **options)  # type: ignore[arg-type]


def content(server: FileServer, name: str = "big") -> bytes:
    return (server.folder / name).read_bytes()


def sha256(server: FileServer, name: str = "big") -> Expected:
    return Expected(num_bytes=len(content(server, name)), sha256=hashlib.sha256(content(server, name)).hexdigest())


# ---------------------------------------------------------------- one file


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("name", ["big", "empty"])
def test_a_whole_file_arrives_over_several_connections_and_leaves_nothing_beside_it(
    server: FileServer, tmp_path: Path, name: str, ranges: bool
):
    server.ranges = ranges
    path = file_of(server, tmp_path, name, expected=sha256(server, name)).require()
    assert path.read_bytes() == content(server, name)
    assert {p.name for p in path.parent.iterdir()} == {name, f"{name}.lock"}
    requests = server.requests[name]
    assert file_of(server, tmp_path, name).require() == path
    assert server.requests[name] == requests, "what is here is not asked for again"
    if name == "big" and not ranges:
        assert server.most_at_once == 1


def test_only_the_chunks_of_a_range_travel_and_neighbours_are_not_asked_for_twice(server: FileServer, tmp_path: Path):
    file = file_of(server, tmp_path)
    begin, end = 3 * CHUNK_BYTES + 10, 4 * CHUNK_BYTES + 20
    for _ in range(2):
        descriptor = file.open(begin, end)
        assert os.pread(descriptor, end - begin, begin) == content(server)[begin:end]
        os.close(descriptor)
    assert server.bytes_sent["big"] == 2 * CHUNK_BYTES + 1  # and the byte that asks for the size
    part = tmp_path / "cache" / "big.part"
    assert part.stat().st_size == MANY
    assert part.stat().st_blocks * 512 <= 3 * CHUNK_BYTES, "the file is not sparse"
    assert file.require().read_bytes() == content(server)
    assert server.bytes_sent["big"] == MANY + 1


@pytest.mark.parametrize("ranges", [True, False])
def test_cut_connections_are_taken_up_where_they_broke(server: FileServer, tmp_path: Path, ranges: bool):
    server.ranges = ranges
    server.cut_after = lambda _name, number: 2 * CHUNK_BYTES + 999 if number in (2, 3) else None
    assert file_of(server, tmp_path).require().read_bytes() == content(server)
    if ranges:
        assert server.bytes_sent["big"] < MANY + 3 * CHUNK_BYTES, "chunks that had come were fetched again"


def test_a_process_killed_in_a_fetch_loses_no_finished_request(server: FileServer, tmp_path: Path):
    """SIGKILL in the middle: the lock is free, the journal says what is there, the rest is fetched."""
    server.pause_s = 0.02
    code = (
        "from pathlib import Path\nfrom expertmesh.remote_file import RemoteFile\n"
        "from expertmesh.config import WeightsConfig\n"
        f"path = Path({str(tmp_path / 'cache' / 'big')!r})\n"
        f"RemoteFile('{server.url}/big', path, WeightsConfig(num_connections=1)).require()"
    )
    child = subprocess.Popen([sys.executable, "-P", "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT / ".link")})
    journal = tmp_path / "cache" / "big.chunks"
    deadline = time.monotonic() + 60.0
    while not (journal.exists() and b"1" in journal.read_bytes().partition(b"\n")[2]):
        assert time.monotonic() < deadline
        assert child.poll() is None, "the fetch ended before it could be killed"
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    server.pause_s = 0.0
    done = journal.read_bytes().partition(b"\n")[2].count(b"1")
    assert 0 < done < 10
    before = server.bytes_sent["big"]
    assert file_of(server, tmp_path).require().read_bytes() == content(server)
    assert server.bytes_sent["big"] - before <= MANY - done * CHUNK_BYTES + CHUNK_BYTES


def test_processes_of_a_host_share_what_any_of_them_fetched(server: FileServer, tmp_path: Path):
    code = (
        "import hashlib, sys\nfrom pathlib import Path\nfrom expertmesh.remote_file import RemoteFile\n"
        "from expertmesh.config import WeightsConfig\n"
        f"file = RemoteFile('{server.url}/big', Path({str(tmp_path / 'cache' / 'big')!r}), WeightsConfig())\n"
        "file.require(0, 3 << 20)\nprint(hashlib.sha256(file.require().read_bytes()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".link")}
    command = [sys.executable, "-P", "-c", code]
    children = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {child.communicate(timeout=120)[0].strip() for child in children}
    assert said == {sha256(server).sha256}
    assert server.bytes_sent["big"] == MANY + 1


def test_a_checksum_is_tried_twice_then_named(server: FileServer, tmp_path: Path):
    first = iter([True])
    server.garble = lambda _name, data: data[:-1] + b"?" if len(data) > 1 and next(first, False) else data
    assert file_of(server, tmp_path, expected=sha256(server)).require().read_bytes() == content(server)
    (tmp_path / "cache" / "big").unlink()
    server.garble = lambda _name, data: bytes(len(data))
    with pytest.raises(ChecksumMismatch) as caught:
        file_of(server, tmp_path, expected=sha256(server)).require()
    assert caught.value.expected == sha256(server).sha256 != caught.value.actual
    assert not list((tmp_path / "cache").glob("big.[pc]*")), "damaged bytes are kept"


def test_a_busy_server_is_asked_again_and_a_dead_one_given_up(server: FileServer, tmp_path: Path):
    server.status = lambda _name, number: 503 if number in (1, 3) else 200
    assert file_of(server, tmp_path).require().read_bytes() == content(server)
    (tmp_path / "cache" / "big").unlink()
    server.status = lambda _name, _number: 503
    with pytest.raises(DownloadFailed, match="503") as caught:
        file_of(server, tmp_path, config=config_of(tmp_path, max_attempts=3)).require()
    assert caught.value.retryable


def test_a_silent_server_is_given_up_and_what_came_is_kept(server: FileServer, tmp_path: Path):
    server.pause_s = 30.0
    with pytest.raises(DownloadFailed, match="big"):
        file_of(server, tmp_path, config=config_of(tmp_path, timeout_s=0.2, max_attempts=2)).require()
    server.pause_s = 0.0
    assert file_of(server, tmp_path).require().read_bytes() == content(server)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_is_not_there_or_not_ours_is_named_at_once(server: FileServer, tmp_path: Path, status: int):
    server.status = lambda _name, _number: status
    with pytest.raises(ModelNotFound, match=str(status)) as caught:
        file_of(server, tmp_path).require()
    assert caught.value.status == status
    assert ("HF_TOKEN" in str(caught.value)) == (status != 404)
    assert server.requests["big"] == 1


def test_a_file_that_changed_on_the_server_is_not_mixed_with_what_came_before(server: FileServer, tmp_path: Path):
    file = file_of(server, tmp_path)
    file.require(0, CHUNK_BYTES)
    (server.folder / "big").write_bytes(random.Random(2).randbytes(MANY))
    with pytest.raises(DownloadFailed, match="changed on the server"):
        file.require()
    assert file.require().read_bytes() == content(server)


def test_a_full_disk_is_said_before_and_while_it_fills(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("expertmesh.remote_file.shutil.disk_usage", lambda _path: usage._replace(free=5 * CHUNK_BYTES))
    file_of(server, tmp_path).require(0, CHUNK_BYTES)
    with pytest.raises(DiskFull, match="cache_dir") as caught:
        file_of(server, tmp_path).require()
    assert caught.value.needed > caught.value.free == 5 * CHUNK_BYTES
    monkeypatch.undo()

    def full(*_arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("expertmesh.remote_file.os.pwrite", full)
    with pytest.raises(DiskFull):
        file_of(server, tmp_path).require()
    monkeypatch.undo()
    assert file_of(server, tmp_path).require().read_bytes() == content(server)


# ---------------------------------------------------------------- a model


@pytest.mark.parametrize("stored", ["one", "many"])
def test_a_remote_model_has_the_tensors_of_the_local_one(models: dict[str, Path], tmp_path: Path, stored: str):
    local = Checkpoint(models[stored])
    with FileServer(models[stored]) as server:
        remote = open_model(server.url, config_of(tmp_path))
        assert remote.config == local.config
        assert set(remote.names) == set(local.names)
        for name in local.names:
            shape = local.entry(name).shape
            assert torch.equal(
                remote.read(name, shape, dtype=torch.float32), local.read(name, shape, dtype=torch.float32)
            )
    if stored == "one":
        ours, theirs = Tokenizer.for_checkpoint(remote.folder), Tokenizer.for_checkpoint(models[stored])
        assert ours.encode("Hello") == theirs.encode("Hello")


@pytest.mark.parametrize("stored", ["one", "many"])
def test_one_expert_fetches_its_own_tensors_and_little_more(models: dict[str, Path], tmp_path: Path, stored: str):
    with FileServer(models[stored]) as server:
        remote = open_model(server.url, config_of(tmp_path))
        names = [name for name in remote.names if ".layers.1.mlp.experts.5." in name]
        own = sum(remote.entry(name).num_bytes for name in names)
        for name in names:
            remote.read(name, remote.entry(name).shape, dtype=torch.float32)
        sent = sum(count for name, count in server.bytes_sent.items() if name.endswith(".safetensors"))
        assert len(names) == 3
        assert own < sent <= own + 5 * CHUNK_BYTES < 9 << 20
        if stored == "many":
            assert len([name for name in server.requests if name.endswith(".safetensors")]) <= 2


def test_whole_files_are_verified_where_the_server_lists_their_sums(models: dict[str, Path], tmp_path: Path):
    folder = tmp_path / "served"
    shutil.copytree(models["many"], folder)
    sums = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(sums))
    with FileServer(folder) as server:
        config = config_of(tmp_path, whole_files=True)
        remote = open_model(server.url, config)
        first = remote.names[0]
        remote.read(first, remote.entry(first).shape, dtype=torch.float32)
        weights = remote.entry(first).file
        assert weights.read_bytes() == (folder / weights.name).read_bytes()
        assert "chat_template.jinja.absent" not in {p.name for p in remote.folder.iterdir()}
        server.garble = lambda name, data: bytes(len(data)) if name.endswith(".safetensors") else data
        other = open_model(server.url, replace(config, cache_dir=str(tmp_path / "other")))
        with pytest.raises(ChecksumMismatch, match=r"safetensors"):
            other.entry(first)
        (folder / "SHA256SUMS").write_text("<html>not found</html>\n")
        with pytest.raises(CheckpointError, match="sha256sum"):
            open_model(server.url, replace(config, cache_dir=str(tmp_path / "third")))


def test_a_hub_id_is_pinned_to_a_commit_and_its_token_stays_with_the_hub(models: dict[str, Path], tmp_path: Path):
    with FileServer(models["many"]) as server:
        server.commit, server.token = "a" * 40, "hf_secret"
        config = config_of(tmp_path, hub_endpoint=server.url, hub_token="hf_secret")
        name = pinned("Org/Some-MoE", config)
        assert name == f"Org/Some-MoE@{'a' * 40}"
        assert model_name(name) == model_name("https://host/x/Some-MoE/") == "Some-MoE"
        server.commit = "b" * 40
        remote = open_model(name, config)
        assert remote.folder == model_folder(name, config) == tmp_path / "cache" / "Org--Some-MoE" / ("a" * 40)
        first = remote.names[0]
        assert torch.equal(
            remote.read(first, remote.entry(first).shape, dtype=torch.float32),
            Checkpoint(models["many"]).read(first, remote.entry(first).shape, dtype=torch.float32),
        )
        assert server.tokens_at_cdn
        assert set(server.tokens_at_cdn) == {""}, "the token was sent to where the hub redirects"
        assert pinned("Org/Some-MoE", config) == f"Org/Some-MoE@{'b' * 40}"
        with pytest.raises(ModelNotFound, match="HF_TOKEN"):
            pinned("Org/Some-MoE", replace(config, hub_token=""))


def test_names_are_told_apart(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_of(tmp_path)
    assert pinned(str(models["one"]), config) == str(models["one"])
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert pinned("org/model", config) == str(tmp_path / "org" / "model"), "a folder that exists is that folder"
    with pytest.raises(CheckpointError, match="does not exist"):
        open_model(str(tmp_path / "nowhere"), config)
    with FileServer(models["one"]) as server:
        server.status = lambda _name, _number: 404
        with pytest.raises(ModelNotFound, match="neither a folder on this host nor a model"):
            pinned("org/absent", replace(config, hub_endpoint=server.url))
