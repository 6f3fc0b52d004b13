"""No bit of an exchanged row falls over unseen, and what follows names the shard without blaming the wrong one."""

import mesh_worlds
import numpy as np
import process_world
import pytest
import torch
from mesh_worlds import LAYERS, SHAPE, TinyExperts, placement, toy_model
from test_mesh import QUICK, check, expected

from expertmesh.bench.bit_flips import is_named
from expertmesh.errors import GuardError
from expertmesh.router.epoch import Epoch
from expertmesh.router.guard import (
    BadRow,
    Direction,
    Fault,
    Guard,
    GuardPolicy,
    all_finite,
    checksums,
    non_finite_rows,
)
from expertmesh.router.local_mesh import LocalMesh


def rows_of(num_rows, num_words, seed=0):
    return np.random.default_rng(seed).integers(-(2**31), 2**31, (num_rows, num_words)).astype(np.int32)


def test_every_single_bit_of_a_row_counts():
    words = rows_of(1, 24)
    flipped = np.repeat(words, 24 * 32, axis=0)
    bits = np.arange(24 * 32)
    flipped[bits, bits // 32] ^= (np.uint32(1) << (bits % 32).astype(np.uint32)).view(np.int32)
    assert not (checksums(flipped) == checksums(words)[0]).any()


@pytest.mark.parametrize("same_bit", [True, False], ids=["one bit of several words", "any bits"])
def test_several_bits_of_a_row_count(same_bit):
    """Sign bits of two values cancel in a plain sum, and in a 32-bit one whatever its multipliers."""
    generator = np.random.default_rng(1)
    words = rows_of(4000, 40, seed=2)
    flipped = words.copy()
    for row, num_bits in enumerate(generator.integers(2, 9, len(words))):
        where = generator.choice(40, num_bits, replace=False)
        bits = np.full(num_bits, 31 - row % 32) if same_bit else generator.integers(0, 32, num_bits)
        flipped[row, where] ^= (np.uint32(1) << bits.astype(np.uint32)).view(np.int32)
    assert not (checksums(flipped) == checksums(words)).any()


def test_a_checksum_does_not_depend_on_the_other_rows_or_on_the_width_seen_before():
    words = rows_of(5, 40000)
    assert checksums(words[:, :8]).tolist() == [int(checksums(row[None, :8])[0]) for row in words]
    assert checksums(words)[2] == checksums(words[2:3])[0]
    assert checksums(np.zeros((0, 8), np.int32)).shape == (0,)


def test_rows_that_are_not_finite_are_found_and_large_ones_are_not():
    rows = torch.full((4, 8), 3e38)
    assert all_finite(rows)  # their sum is not
    assert all_finite(rows[:0])
    rows[1, 3], rows[2, 0], rows[2, 1] = float("nan"), float("inf"), -float("inf")
    assert not all_finite(rows)
    assert not all_finite(rows[2:3])
    assert non_finite_rows(rows) == [1, 2]


# ---- what follows


def bad(shard, fault=Fault.DAMAGED, direction=Direction.RETURN):
    return BadRow(fault=fault, direction=direction, source=0, ep_rank=0, layer_id=1, row=2, experts=(7,), shard=shard)


def make_guard(**policy):
    clock, reported = [0.0], []
    guard = Guard(
        GuardPolicy(**policy), on_suspect=lambda shard, why: reported.append((shard, why)), clock=lambda: clock[0]
    )
    return guard, clock, reported


def fail(guard, *rows):
    return guard.failed(rows, step_id=1, epoch=1)


def test_a_shard_is_reported_at_the_third_bad_row_and_once_a_window():
    guard, clock, reported = make_guard()
    for clock[0] in (0.0, 10.0):
        fail(guard, bad("s1"))
        guard.passed()
    assert reported == []
    clock[0] = 65.0  # the first is out of the window
    fail(guard, bad("s1"))
    assert reported == []
    error = fail(guard, bad("s1"))
    assert [shard for shard, _ in reported] == ["s1"]
    assert "layer 1, expert 7: damaged" in reported[0][1]
    assert "row 2 from shard s1 (ep_rank 0) to rank 0, layer 1, expert 7: damaged" in str(error)
    fail(guard, bad("s1"))
    assert len(reported) == 1
    clock[0] = 130.0
    for _ in range(3):
        fail(guard, bad("s1"))
    assert len(reported) == 2
    assert (guard.num_bad_rows, guard.num_replays) == (8, 8)


def test_bad_rows_of_many_shards_are_no_shards_fault():
    guard, _, reported = make_guard()
    for i in range(30):
        fail(guard, bad(f"s{i % 2}"))
    assert reported == []


def test_a_row_that_is_finite_elsewhere_was_its_shards_fault_and_one_that_never_is_was_nobodys():
    guard, _, reported = make_guard(max_bad_rows=1)
    fail(guard, bad("s1", Fault.NOT_FINITE))
    assert not guard.accepts_non_finite
    assert reported == []
    guard.passed()
    assert [shard for shard, _ in reported] == ["s1"]
    for _ in range(2):
        fail(guard, bad("s2", Fault.NOT_FINITE))
    assert guard.accepts_non_finite
    guard.passed()
    assert len(reported) == 1
    assert guard.attempt == 0


# ---- in a step


class SickExperts(TinyExperts):
    """The next `sick` products hold a NaN."""

    sick = 0

    def forward(self, layer_id, rows, slot_ids):
        products = super().forward(layer_id, rows, slot_ids)
        if self.sick and layer_id == LAYERS[1]:
            self.sick -= 1
            products[5, 3] = float("nan")
        return products


def run_local(sick):
    experts = SickExperts()
    local = LocalMesh(experts, placement(1, 1), SHAPE)
    headers, errors = [], []
    local.start(headers.append)
    experts.sick = sick
    while True:
        local.bid(3, 0)
        try:
            output = toy_model(local.enter(headers.pop()), 1, 3)
        except GuardError as error:
            errors.append(error)
            continue
        local.close()
        return output, errors


def test_a_product_that_is_not_finite_once_is_computed_again():
    output, (error,) = run_local(1)
    assert output.equal(expected([(1, 3)])[1])
    (row,) = error.bad
    assert (row.fault, row.direction, row.layer_id) == (Fault.NOT_FINITE, Direction.RETURN, LAYERS[1])
    generator = torch.Generator().manual_seed(1)  # as toy_model draws
    torch.randn(3, SHAPE.hidden_size, generator=generator)
    for _ in range(2):
        ids = torch.rand(3, mesh_worlds.NUM_EXPERTS, generator=generator).argsort(1)[:, : SHAPE.top_k]
        torch.rand(3, SHAPE.top_k, generator=generator)
    assert row.experts == (int(ids.flatten()[5]),)


def test_a_product_that_is_never_finite_is_let_through_after_two_replays():
    output, errors = run_local(99)
    assert len(errors) == 2
    assert output[1].isnan().any()
    assert output[[0, 2]].equal(expected([(1, 3)])[1][[0, 2]])


def test_finite_rows_with_too_large_a_sum_are_no_damage():
    class Huge(TinyExperts):
        def forward(self, layer_id, rows, slot_ids):
            return torch.full_like(super().forward(layer_id, rows, slot_ids), 3e38)

    local = LocalMesh(Huge(), placement(1, 1), SHAPE)
    headers = []
    local.start(headers.append)
    local.bid(2, 0)
    step = local.enter(headers.pop())
    for layer_id in LAYERS:
        ids = torch.arange(SHAPE.top_k, dtype=torch.int32).repeat(2, 1)
        out = step.moe(layer_id, torch.ones(2, SHAPE.hidden_size), ids, torch.ones(2, SHAPE.top_k))
        assert out.isinf().all()
    assert local.guard.num_bad_rows == 0
    local.close()


def test_an_owner_whose_product_is_not_finite_has_its_weights_checked_before_it_answers():
    experts = SickExperts()
    local = LocalMesh(experts, placement(1, 1), SHAPE)
    headers, asked = [], []
    local.start(headers.append)
    local.guard.heal = lambda layer_id: asked.append(layer_id) or True  # repaired: multiply again
    experts.sick = 1
    local.bid(3, 0)
    output = toy_model(local.enter(headers.pop()), 1, 3)
    local.close()
    assert output.equal(expected([(1, 3)])[1])
    assert asked == [LAYERS[1]]
    assert local.guard.num_bad_rows == 0


# ---- on the wire


def test_bits_that_fall_over_on_the_wire_are_named_and_change_no_output():
    """A small cut of `make bit-flips`: two sources, two shards that hold all experts; one message in twelve is hit."""
    num_batches = 60
    with process_world.ProcessWorld(mesh_worlds.flipping_process, 4, "aaee", QUICK, 1 / 12) as world:

        def ask_all(method, *args, ranks=range(4)):
            for rank in ranks:
                world.connections[rank].send((method, args))
            return [world.receive(rank) for rank in ranks]

        members = tuple(ask_all("member"))
        epoch = Epoch(
            number=1,
            members=members,
            placement=placement(2, 2),
            rendezvous_key="flips",
            store_host=members[0].host,
            store_port=members[0].store_port,
        )
        ask_all("prepare", epoch)
        ask_all("commit", 1)
        batches = {rank: [(1000 * rank + i, 1 + i % 4) for i in range(num_batches)] for rank in (0, 1)}
        for rank, mine in batches.items():
            world.connections[rank].send(("submit", (mine,)))
            world.receive(rank)
        seen = []
        for rank, mine in batches.items():
            outputs = []
            while len(outputs) < num_batches:
                (((batch_id, output, number),),) = ask_all("collect", 1, ranks=[rank])
                if isinstance(output, torch.Tensor):
                    outputs.append((batch_id, output, number))
                else:
                    assert output.startswith("GuardError"), output
            check(outputs, mine)
            seen.append(ask_all("guarded", ranks=[rank])[0])
        flips = [flip for found in ask_all("flips") for flip in found]
        for rank in range(4):
            world.connections[rank].send(("end", ()))
    assert len(flips) > 40
    assert any(flip.in_rows for flip in flips)
    silent = []
    for flip in flips:
        source = flip.receiver if flip.is_return else flip.sender
        if not is_named(flip, seen[source], LAYERS, first_shard=2):
            silent.append(flip)
    assert silent == []
    named = [row for found in seen for _, row in found if row.row >= 0]
    assert named
    assert all(row.experts and row.shard for row in named)
