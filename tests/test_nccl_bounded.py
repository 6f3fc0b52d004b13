"""The bounded form of the NCCL exchange: what it saves, and that an answer without a place is never lost: its source
knows, its step alone runs again, and a header that says so to all makes the next one whole."""

import exchange_emulated
import exchange_worlds
import mesh_worlds
import nccl_emulated
import process_world
import pytest
import torch
from exchange_conformance import LAYOUTS, TOP_K, check_bounded, make_epoch
from test_exchange_device import Products, reference_outputs
from test_nccl_pack import draw, one_turn

from expertmesh.errors import GuardError
from expertmesh.router.device_step import DeviceStep
from expertmesh.router.epoch import WHOLE, StepHeader
from expertmesh.router.exchange import RowShape
from expertmesh.router.group import RendezvousStore
from expertmesh.router.guard import Guard
from expertmesh.router.leader import BidPlaced, EpochInstalled, Leader, StepDone
from expertmesh.router.local_mesh import LocalMesh
from expertmesh.router.nccl_form import NcclForms

CPU = torch.device("cpu")
SHAPE = RowShape(hidden_size=24, top_k=TOP_K, dtype=torch.bfloat16)


def forms(num_owners, **fields):
    return NcclForms(**{"num_owners": num_owners, "top_k": 8, "row_bytes": 8192, "exact_above": 256, **fields})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_comes_back_or_its_source_is_told_and_the_whole_step_brings_it(layout):
    """Routing of all kinds, to few places: all to one owner included."""
    epoch = make_epoch(layout, redundant=5)
    exchanges, _ = nccl_emulated.make_exchanges(epoch, SHAPE, bounded=True)
    results = exchange_emulated.run_ranks(
        len(exchanges), lambda rank: check_bounded(rank, epoch, exchanges[rank], SHAPE), CPU
    )
    for rank, (pairs, num_overflows) in enumerate(results):
        assert (pairs > 100) == epoch.members[rank].attention
        assert num_overflows == 0 or epoch.members[rank].attention
    assert (sum(num for _, num in results) > 0) == (len(epoch.expert_ranks) > 1)


def test_few_places_are_enough_for_an_even_draw_and_then_few_bytes_travel():
    epoch = make_epoch("2 colocated")
    exchanges, world = nccl_emulated.make_exchanges(epoch, SHAPE, bounded=True)
    places = exchanges[0].forms.bound(16, whole=False)
    assert places == 40  # of 64; 32 are the even share
    x, ids = draw(16)
    ids = [(torch.arange(4) * 3 + torch.arange(16)[:, None]).int() % 12 for _ in ids]  # two of four everywhere
    turns = one_turn(exchanges, epoch, x, ids, stride=16, scale=2.0)
    for rank, (y, verdict, _) in enumerate(turns):
        assert verdict == type(verdict)()
        assert y.equal((x[rank] * 2)[:, None].expand(-1, TOP_K, -1))
    assert world.num_bytes == 2 * (16 * 64 + places * 48)


def test_only_the_source_whose_answers_do_not_fit_is_told_and_learns_the_first_layer():
    epoch = make_epoch("2 colocated")
    exchanges, _ = nccl_emulated.make_exchanges(epoch, SHAPE, bounded=True)
    x, ids = draw(16)
    ids[0] = torch.tensor([6, 7, 8, 9]).int().repeat(16, 1)  # all to owner 1, where 40 have a place
    ids[1] = torch.tensor([6, 7, 8, 9]).int().repeat(16, 1)  # its own, which do not travel
    (y, first, _), (other, second, _) = one_turn(exchanges, epoch, x, ids, layer_id=2, stride=16)
    assert (first.overflow, first.bad) == (2, ())
    assert (second.overflow, second.bad) == (-1, ())
    assert y[:10].equal(x[0][:10, None].expand(-1, TOP_K, -1))
    assert not y[10:].any()  # nothing that anybody could take for a row
    assert other.equal(x[1][:, None].expand(-1, TOP_K, -1))
    ids[0][10:, :] = -1  # 40 in all: each has its place
    assert one_turn(exchanges, epoch, x, ids, layer_id=2, stride=16)[0][1].overflow == -1


def test_a_step_without_places_runs_again_as_a_whole_one_and_gives_the_same_as_one_rank():
    """Rank 0 overflows in both steps that were launched; the second is void behind the first. Rank 1 keeps its own."""
    epoch = make_epoch("2 colocated")
    exchanges, _ = nccl_emulated.make_exchanges(epoch, SHAPE, bounded=True)
    guards = [Guard(), Guard()]
    skewed = torch.tensor([6, 7, 8, 9]).int().repeat(16, 1)
    even = (torch.arange(4) * 3 + torch.arange(16)[:, None]).int() % 12

    def run(header, rank, ids):
        exchange = exchanges[rank]
        exchange.use_placement(epoch.placement)
        step = DeviceStep(
            header,
            rank=rank,
            placement=epoch.placement,
            exchange=exchange,
            experts=Products(epoch.placement, rank),
            shape=SHAPE,
            guard=guards[rank],
        )
        generator, outputs = torch.Generator().manual_seed(rank), []
        for layer_id in epoch.placement.moe_layers:
            x = torch.randn(16, 24, generator=generator).bfloat16()
            weights = torch.rand(16, TOP_K, generator=generator)
            outputs.append((step.moe(layer_id, x, ids, weights), x, ids, weights))
        return step, outputs

    def both(headers):
        ids = skewed, even
        return exchange_emulated.run_ranks(2, lambda rank: [run(header, rank, ids[rank]) for header in headers], CPU)

    plain = [StepHeader(step_id=i, epoch=1, placement_version=1, num_tokens=(16, 16)) for i in (1, 2)]
    (first, second), others = both(plain)
    with pytest.raises(GuardError, match="more answers than places in layer 0; the step is run again") as told:
        first[0].finish()
    assert (told.value.layer_id, told.value.step_id, told.value.bad) == (0, 1, ())
    second[0].finish()  # void, and one incident
    for step, outputs in others:
        step.finish()
        assert all(out.equal(wanted) for out, wanted in reference_outputs(outputs, epoch, SHAPE))
    assert [guard.wants_whole for guard in guards] == [True, False]
    assert (guards[0].num_overflows, guards[0].attempt) == (1, 0)

    again = StepHeader(step_id=9, epoch=1, placement_version=1, num_tokens=(16, 16), flags=WHOLE)
    ((step, outputs),), ((other, _),) = both([again])
    step.finish()
    other.finish()
    assert all(out.equal(wanted) for out, wanted in reference_outputs(outputs, epoch, SHAPE))
    assert guards[0].wants_whole
    for _ in range(15):
        guards[0].passed()
    assert not guards[0].wants_whole


def test_steps_are_whole_for_longer_each_time():
    guard, lengths = Guard(), []
    for _ in range(10):
        guard.overflowed(layer_id=1, step_id=1, epoch=1)
        lengths.append(0)
        while guard.wants_whole:
            guard.passed()
            lengths[-1] += 1
    assert lengths == [16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 4096]


@pytest.mark.parametrize("whole", [False, True])
def test_one_bid_that_asks_for_a_whole_step_makes_it_so_for_all(whole):
    leader = Leader(max_prefill_tokens=100)
    leader.step(EpochInstalled(make_epoch("2 colocated")), 0.0)
    leader.step(BidPlaced("m0", 1, 0, 0), 1.0)  # step 1 names m0 alone
    leader.step(BidPlaced("m1", 1, 0, 0, whole=whole), 2.0)
    leader.step(BidPlaced("m0", 1, 0, 1), 2.0)
    leader.step(StepDone("m0", 1), 3.0)
    (issued,) = leader.step(StepDone("m1", 1), 3.0)
    assert issued.header.num_tokens == (1, 1)
    assert issued.header.flags == (WHOLE if whole else 0)


def test_a_process_whose_answers_had_no_place_bids_for_whole_steps_until_enough_went_through():
    local = LocalMesh(mesh_worlds.TinyExperts(), mesh_worlds.placement(1, 1), mesh_worlds.SHAPE)
    headers = []
    local.start(headers.append)
    local.guard.overflowed(layer_id=1, step_id=1, epoch=1)
    flags = []
    for _ in range(17):
        local.bid(1, 0)
        step = local.enter(headers[-1])
        mesh_worlds.toy_model(step, 1, 1)
        flags.append(headers[-1].flags)
    assert flags == [WHOLE] * 16 + [0]
    local.close()


def test_places_are_a_quarter_more_than_the_even_share_and_bound_only_what_pays():
    two, four, eight = forms(2), forms(4), forms(8)
    assert two.bound(128, whole=False) == 731  # 1.25 * 512 + 4 * 22.6 of 1024: 2.3 MiB less
    assert two.bound(64, whole=False) == 384  # of 512: 1 MiB less
    assert two.bound(63, whole=False) == 0  # would save less than its launch and copy cost
    assert four.bound(128, whole=False) == 448  # 1.5 * 256 + 64: three owners of which 576 places each are saved
    assert eight.bound(32, whole=False) == 79
    assert forms(1).bound(2048, whole=False) == 0
    assert two.bound(2048, whole=False) == 10603
    assert not two.is_exact(2048, whole=False)  # no host in it: it may stand in a graph


def test_a_whole_step_and_many_owners_count_exactly_where_turns_are_large():
    assert [forms(2).bound(n, whole=True) for n in (128, 2048)] == [0, 0]
    assert [forms(2).is_exact(n, whole=True) for n in (256, 257)] == [False, True]
    assert forms(16).bound(256, whole=False) > 0
    assert forms(16).is_exact(257, whole=False)


def test_a_graph_holds_for_steps_of_its_form_alone():
    epoch = make_epoch("2 colocated")
    (exchange, _), _ = nccl_emulated.make_exchanges(epoch, SHAPE, bounded=True)

    def key(bucket, flags=0):
        header = StepHeader(step_id=1, epoch=1, placement_version=1, num_tokens=(5, 5), bucket=bucket, flags=flags)
        return exchange.graph_key(header)

    assert key(0) is None
    assert key(8) == key(8)
    assert len({key(8), key(16), key(8, WHOLE)}) == 3
    assert key(128) is not None
    assert key(128, WHOLE) is None  # counted by the host


@pytest.mark.parametrize("layout", ["2 colocated", "1 attention + 2 shards"])
def test_processes_agree_on_who_has_a_place_without_a_word_about_it_here_over_gloo(layout):
    """A rank of its own process each: counts never travel, whole steps of more than 64 rows are exact."""
    store = RendezvousStore("127.0.0.1")
    num_ranks = exchange_worlds.num_ranks(layout)
    arguments = ("gloo bounded", layout, 0, 0, store.port, f"bounded-{layout}")
    counted = process_world.run(exchange_worlds.conform_bounded, num_ranks, *arguments)
    pairs, num_overflows = (sum(part) for part in zip(*counted, strict=True))
    assert pairs > 500
    assert num_overflows > 0
