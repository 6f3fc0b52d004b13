"""Promise: an expert comes from a peer's memory where one has it, from disk where not, and never unlike its truth."""

import socket
import threading

import pytest
import torch

from expertmesh.checkpoint import Checkpoint
from expertmesh.errors import CheckpointError
from expertmesh.experts import weights
from expertmesh.experts.copies import CopyLayout, CopyServer, PeerCopies
from expertmesh.experts.mlp import LocalExpertMLP
from expertmesh.experts.scrub import Scrubber
from expertmesh.make_checkpoint import make_checkpoint
from expertmesh.router.epoch import Member
from expertmesh.router.placement import uniform

NUM_EXPERTS, LAYERS, HOST, TOKEN = 8, (0, 2), "127.0.0.1", "the cluster's"
CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("copies")
    make_checkpoint(folder, CONFIG, dtype="bfloat16")
    return Checkpoint(folder)


class Giver:
    """A shard of `ep_size` that gives what it holds."""

    def __init__(self, checkpoint, ep_rank=0, ep_size=1, token=TOKEN, dtype=torch.float32):
        self.experts = LocalExpertMLP(checkpoint, dtype=dtype)
        self.experts.set_placement(uniform(3, NUM_EXPERTS, ep_size, moe_layers=LAYERS), ep_rank)
        layout = CopyLayout.of(checkpoint, dtype)
        self.server = CopyServer(self.experts, layout, interface=HOST, cluster_token=token)
        self.member = Member(
            member_id=f"giver{ep_rank}", attention=False, expert=True, copies_port=self.server.port
        )  # fmt: skip


@pytest.fixture
def giver(checkpoint):
    made = Giver(checkpoint)
    yield made
    made.server.close()


@pytest.fixture
def disk_reads(monkeypatch):
    """(layer, expert) of every expert that is read from the checkpoint."""
    found, read = [], weights.read_expert

    def count(checkpoint, layer_id, logical, *rest):
        found.append((layer_id, logical))
        read(checkpoint, layer_id, logical, *rest)

    for module in ("weights", "truth"):
        monkeypatch.setattr(f"expertmesh.experts.{module}.read_expert", count)
    return found


def taker(checkpoint, *members, token=TOKEN, dtype=torch.float32):
    experts = LocalExpertMLP(checkpoint, dtype=dtype)
    layout = CopyLayout.of(checkpoint, dtype)
    peers = PeerCopies("taker", layout, lambda: members, interface=HOST, cluster_token=token)
    experts.take_from(peers)
    return experts, peers


def place(experts, ep_size=1, ep_rank=0):
    experts.set_placement(uniform(3, NUM_EXPERTS, ep_size, moe_layers=LAYERS), ep_rank)
    return experts


def same(experts, other):
    pairs = zip(experts.resident_layers(), other.resident_layers(), strict=True)
    return all(a.w13.equal(b.w13) and a.w2.equal(b.w2) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_newcomer_takes_everything_from_a_peer_and_nothing_from_disk(checkpoint, disk_reads, dtype):
    giver = Giver(checkpoint, dtype=dtype)
    disk_reads.clear()
    experts, peers = taker(checkpoint, giver.member, dtype=dtype)
    assert same(place(experts), giver.experts)
    assert disk_reads == []
    assert peers.num_fetched == giver.server.num_given == len(LAYERS) * NUM_EXPERTS
    giver.server.close()


def test_what_no_peer_has_is_read_from_disk(checkpoint, disk_reads, giver):
    half = Giver(checkpoint, ep_rank=1, ep_size=2)
    disk_reads.clear()
    experts, peers = taker(checkpoint, half.member)
    assert same(place(experts), giver.experts)
    assert peers.num_fetched == len(LAYERS) * NUM_EXPERTS // 2
    assert {logical for _, logical in disk_reads} == set(range(NUM_EXPERTS // 2))
    half.server.close()


def test_damage_in_the_givers_memory_or_truth_is_not_taken_over(checkpoint, disk_reads, giver):
    sound = place(LocalExpertMLP(checkpoint))
    dict(giver.experts.resident_layers())[0].w13[3].view(-1)[5] += 1.0
    with torch.inference_mode():
        giver.experts.truths.of(2, 6).golden[0, 0] += 1.0
    disk_reads.clear()
    experts, _ = taker(checkpoint, giver.member)
    assert same(place(experts), sound)
    assert set(disk_reads) == {(0, 3), (2, 6)}


def test_a_damaged_expert_is_repaired_by_a_peer_when_the_disk_is_gone(checkpoint, giver, monkeypatch):
    experts, _ = taker(checkpoint, giver.member)
    scrubber = Scrubber(place(experts))

    def gone(*_):
        raise CheckpointError("the disk is gone")

    monkeypatch.setattr("expertmesh.experts.truth.read_expert", gone)
    dict(experts.resident_layers())[2].w2[4].mul_(2)
    (fault,) = scrubber.check_all()
    assert (fault.layer_id, fault.expert, fault.repaired_from) == (2, 4, "peer")
    assert scrubber.check_all() == []
    giver.server.close()
    dict(experts.resident_layers())[2].w2[4].mul_(2)
    (fault,) = scrubber.check_all()
    assert fault.repaired_from == ""


@pytest.mark.parametrize("stranger", ["another token", "another dtype"])
def test_strangers_give_each_other_nothing(checkpoint, giver, stranger):
    if stranger == "another token":
        experts, peers = taker(checkpoint, giver.member, token="a guess")
    else:
        experts, peers = taker(checkpoint, giver.member, dtype=torch.bfloat16)
    place(experts)
    assert peers.num_fetched == giver.server.num_given == 0


def test_a_peer_that_dies_in_the_middle_or_says_nothing_is_no_obstacle(checkpoint, giver, monkeypatch):
    monkeypatch.setattr("expertmesh.experts.copies._CONNECT_S", 0.2)
    silent = socket.create_server((HOST, 0))  # accepts in the kernel, and never answers
    port = silent.getsockname()[1]
    members = [Member(member_id="silent", attention=False, expert=True, copies_port=port), giver.member]
    give, served = giver.server._give, []

    def die_after_three(sock, cell):
        if len(served) == 3:
            sock.sendall(b"\x01half")
            raise ConnectionError("killed")
        served.append(cell)
        give(sock, cell)

    monkeypatch.setattr(giver.server, "_give", die_after_three)
    experts, peers = taker(checkpoint, *members)
    assert same(place(experts), giver.experts)
    assert peers.num_fetched == 3
    silent.close()


def test_no_part_of_a_message_waits_for_an_acknowledgement(checkpoint, giver):
    """Nagle's algorithm and a delayed acknowledgement made 40 ms of each expert."""
    experts, peers = taker(checkpoint, giver.member)
    held_back, give, fetch = [], giver.server._give, peers.fetch

    def note(sock):
        held_back.append(not sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    def give_and_look(sock, cell):
        note(sock)
        give(sock, cell)

    def fetch_and_look(*cell):
        found = fetch(*cell)
        note(peers._peers[giver.member.member_id].sock)
        return found

    giver.server._give, peers.fetch = give_and_look, fetch_and_look
    place(experts)
    assert held_back == [False] * (2 * peers.num_fetched)


def test_connections_end_with_the_work(checkpoint, giver):
    before = threading.active_count()
    experts, _ = taker(checkpoint, giver.member)
    place(experts)
    for thread in threading.enumerate():
        if thread.name == "expert-copies" and thread is not threading.current_thread():
            thread.join(timeout=0.5)
    assert threading.active_count() <= before
    assert giver.server._takers == set()


def test_the_fewest_shards_that_hold_every_expert_follow_from_their_memory(checkpoint):
    one = 3 * 64 * 40 * 4  # bytes of an expert in float32
    total = len(LAYERS) * NUM_EXPERTS * one
    assert weights.least_shards(checkpoint, 100 * total, dtype=torch.float32) == 1
    assert weights.least_shards(checkpoint, total, dtype=torch.float32) == 2
    assert weights.least_shards(checkpoint, total // 4, dtype=torch.float32) == 5
    assert weights.least_shards(checkpoint, total // 4, dtype=None) == 3  # bfloat16, as stored
