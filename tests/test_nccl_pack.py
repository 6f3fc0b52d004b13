"""The NCCL exchange without NCCL: in every layout each row finds its expert and comes back, in both forms; no byte
travels that need not; what is not finite is named; the kernels that stand around the all-to-alls compile cleanly."""

import exchange_emulated
import nccl_emulated
import pytest
import torch
from compiling import compile_for
from exchange_conformance import LAYOUTS, TOP_K, check_device, make_epoch

from expertmesh.kernels import jit
from expertmesh.kernels.nccl_pack import PackSizes
from expertmesh.router.device_exchange import NO_BAD_ROW, first_bad_rows
from expertmesh.router.epoch import StepHeader
from expertmesh.router.exchange import RowShape
from expertmesh.router.guard import Direction

CPU = torch.device("cpu")
SHAPE = RowShape(hidden_size=24, top_k=TOP_K, dtype=torch.bfloat16)


@pytest.mark.parametrize("exact_above", [0, 64, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_finds_its_expert_and_comes_back(layout, exact_above):
    """Sources that a header does not name, ranks with one role and owners between sources included."""
    epoch = make_epoch(layout, redundant=5)
    exchanges, _ = nccl_emulated.make_exchanges(epoch, SHAPE, exact_above=exact_above)
    pairs = exchange_emulated.run_ranks(
        len(exchanges), lambda rank: check_device(rank, epoch, exchanges[rank], SHAPE), CPU
    )
    assert sum(pairs) > 500


@pytest.mark.parametrize("hidden", [7, 40])
def test_rows_of_any_size_travel(hidden):
    epoch = make_epoch("2 colocated", redundant=5)
    shape = RowShape(hidden_size=hidden, top_k=TOP_K, dtype=torch.float32)
    exchanges, _ = nccl_emulated.make_exchanges(epoch, shape)
    pairs = exchange_emulated.run_ranks(2, lambda rank: check_device(rank, epoch, exchanges[rank], shape), CPU)
    assert sum(pairs) > 500


def one_turn(exchanges, epoch, x, ids, layer_id=0, *, attempt=0, scale=1.0, stride=8):
    """Each rank of "2 colocated" sends x[rank]; an expert's product is the row times `scale`. Returns y and verdict."""
    header = StepHeader(step_id=1, epoch=1, placement_version=1, num_tokens=(len(x[0]), len(x[1])))

    def turn(rank):
        exchange = exchanges[rank]
        exchange.use_placement(epoch.placement)
        exchange.begin(header, stride=stride, attempt=attempt)
        rows, slots = exchange.dispatch(layer_id, x[rank], ids[rank], stride)
        made = torch.where((slots >= 0)[:, :, None], rows[:, None] * scale, float("nan"))
        y = exchange.combine(made).clone()
        exchange.end()
        if y.is_cuda:
            torch.cuda.current_stream().synchronize()
        return y, exchange.verdict(), slots

    return exchange_emulated.run_ranks(2, turn, x[0].device)


def draw(num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(num_tokens, 24, generator=generator).bfloat16() for _ in range(2)]
    ids = [torch.rand(num_tokens, 12, generator=generator).argsort(1)[:, :TOP_K].int() for _ in range(2)]
    return x, ids


@pytest.mark.parametrize(("exact_above", "num_bytes"), [(64, 2 * 8 * (64 + TOP_K * 48)), (0, None)])
def test_a_rank_sends_itself_nothing_and_others_no_more_than_the_form_needs(exact_above, num_bytes):
    """Padded: a message a token of the stride and its full answer. Exact: counts, needed rows and needed pairs."""
    epoch = make_epoch("2 colocated")
    exchanges, world = nccl_emulated.make_exchanges(epoch, SHAPE, exact_above=exact_above)
    x, ids = draw(5)
    one_turn(exchanges, epoch, x, ids)
    if num_bytes is None:
        away = [ids[rank] // 6 != rank for rank in range(2)]
        rows, pairs = (sum(int(part.sum()) for part in some) for some in ([a.any(1) for a in away], away))
        num_bytes = 2 * 8 + rows * 64 + pairs * 48
    assert world.num_bytes == num_bytes


@pytest.mark.parametrize("exact_above", [0, 64])
def test_what_is_not_finite_is_named_by_layer_token_and_who_made_it(exact_above):
    epoch = make_epoch("2 colocated")
    exchanges, _ = nccl_emulated.make_exchanges(epoch, SHAPE, exact_above=exact_above)
    x, ids = draw(5)
    ids[0][1] = -1
    x[0][1, 3] = float("nan")  # nobody asked for it
    assert [verdict.bad for _, verdict, _ in one_turn(exchanges, epoch, x, ids)] == [(), ()]
    x[1][3, 23] = float("inf")
    (_, first, _), (_, second, _) = one_turn(exchanges, epoch, x, ids, layer_id=2)
    assert first.bad == ()
    (bad,) = second.bad  # not its answers too: they follow from it
    assert (bad.direction, bad.source, bad.layer_id, bad.row) == (Direction.DISPATCH, 1, 2, 3)
    x, ids = draw(5, seed=1)
    for source, (_, verdict, _) in enumerate(one_turn(exchanges, epoch, x, ids, layer_id=3, scale=float("inf"))):
        owners = {int(owner) for owner in (ids[source][0] // 6)}
        assert owners <= {bad.ep_rank for bad in verdict.bad}
        assert {(bad.direction, bad.source, bad.layer_id) for bad in verdict.bad} == {(Direction.RETURN, source, 3)}
        assert min(bad.row for bad in verdict.bad) == 0
    assert [verdict.bad for _, verdict, _ in one_turn(exchanges, epoch, x, ids)] == [(), ()]


def test_the_first_bad_row_is_an_owners_only_where_it_came_from_a_finite_one():
    def named(own, *returned):
        return [(bad.direction, bad.ep_rank, bad.layer_id, bad.row) for bad in first_bad_rows(7, own, returned)]

    def key(layer_id, token, k=0):
        return layer_id << 40 | token << 8 | k

    none = NO_BAD_ROW
    assert named(none, none, none) == []
    assert named(key(2, 3), none, key(2, 3, 1)) == [(Direction.DISPATCH, 0, 2, 3)]
    assert named(key(3, 4), key(2, 4, 1), key(3, 4)) == [(Direction.RETURN, 0, 2, 4)]
    assert named(none, none, key(0, 0)) == [(Direction.RETURN, 1, 0, 0)]
    assert named((1 << 64) - 1, (1 << 64) - 1) == []  # as the peer exchange says it


def test_an_attempt_asks_other_copies_though_nothing_but_device_memory_changed():
    epoch = make_epoch("2 colocated", redundant=12)  # every expert twice
    exchanges, _ = nccl_emulated.make_exchanges(epoch, SHAPE)
    x, ids = draw(5)
    asked = [one_turn(exchanges, epoch, x, ids, attempt=attempt) for attempt in (0, 1, 2)]
    assert not asked[0][0][2].equal(asked[1][0][2])
    assert asked[0][0][2].equal(asked[2][0][2])
    assert all(asked[0][rank][0].equal(asked[1][rank][0]) for rank in range(2))


def test_a_message_is_a_row_a_number_and_its_slots_in_whole_pieces():
    common = {"num_sources": 2, "num_owners": 2, "own_source": 0, "own_owner": 0}
    wide = PackSizes(hidden=4096, top_k=8, dtype=torch.bfloat16, **common)
    assert wide.message_bytes == 8192 + 32
    assert wide.has_kernels
    assert PackSizes(hidden=24, top_k=32, dtype=torch.float32, **common).message_bytes == 96 + 80
    assert not PackSizes(hidden=7, top_k=8, dtype=torch.bfloat16, **common).has_kernels
    assert not PackSizes(hidden=8, top_k=33, dtype=torch.bfloat16, **common).has_kernels
    assert not PackSizes(hidden=8, top_k=8, dtype=torch.float16, **common).has_kernels


@pytest.mark.parametrize(
    "defines",
    [{}, {"HIDDEN": 2048}, {"HIDDEN": 24, "TOP_K": 4}, {"HIDDEN": 4096, "TOP_K": 32, "FLOAT32": 1}],
    ids=["235B", "30B", "tiny", "wide"],
)
def test_the_kernels_compile_without_spills(defines, private_cubins):
    for compiled in compile_for(jit.SUPPORTED_ARCHS, "nccl_pack.cu", defines):
        uses = compiled.use()
        assert {use.name for use in uses} == {
            "count",
            "pack",
            "unpack",
            "pack_answers",
            "pack_bounded",
            "unpack_answers",
        }
        assert all(use.clean for use in uses), (compiled.key, uses)
