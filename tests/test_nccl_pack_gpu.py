"""The kernels around NCCL's all-to-alls on one GPU: each gives what plain torch gives, and all together, several ranks
of one process, bring every row to its expert and back; graphs and real NCCL are in test_exchange_pair_gpu.py."""

import exchange_emulated
import nccl_emulated
import pytest
import torch
from exchange_conformance import LAYOUTS, TOP_K, check_bounded, check_device, make_epoch
from test_nccl_pack import draw, one_turn

from expertmesh.errors import KernelError
from expertmesh.kernels.nccl_pack import (
    BAD_ANSWER,
    BAD_ROW,
    KEY_SHIFT,
    NO_PLACE,
    NONE,
    NUM_SLOTS,
    NcclPack,
    PackSizes,
    pairs_pitch,
)
from expertmesh.kernels.nccl_pack_reference import TorchPack
from expertmesh.router.device_exchange import copies_table
from expertmesh.router.exchange import RowShape
from expertmesh.router.guard import Direction
from expertmesh.router.placement import uniform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GPU = torch.device("cuda", 0)
NUM_EXPERTS, LAYER = 48, 2
ROLES = [(2, 2, 0, 0), (2, 2, 1, 1), (5, 3, 3, 1), (1, 40, 0, -1)]  # sources, owners, own source, own owner
WIDE, TINY = (1032, 8, torch.bfloat16), (24, 4, torch.float32)  # hidden, top_k, dtype
BIG, MANY = (4096, 8, torch.bfloat16), (136, 32, torch.bfloat16)
# 2500: more than a block of `count` takes at once.
TURNS = [(WIDE, 0), (WIDE, 1), (WIDE, 37), (TINY, 37), (TINY, 2500), (BIG, 5), (MANY, 37), (MANY, 300)]


class Case:
    """One rank's tokens, table and memory; `both` runs kernels and torch on memory of their own."""

    def __init__(self, roles, row, num_tokens):
        num_sources, num_owners, own_source, own_owner = roles
        hidden, top_k, dtype = row
        self.sizes = PackSizes(
            num_sources=num_sources,
            num_owners=num_owners,
            own_source=own_source,
            own_owner=own_owner,
            hidden=hidden,
            top_k=top_k,
            dtype=dtype,
        )
        self.packs = NcclPack(self.sizes, GPU), TorchPack(self.sizes)
        generator = self.generator = torch.Generator().manual_seed(num_tokens)
        self.noise_generator = torch.Generator(device=GPU).manual_seed(num_tokens)
        placement = uniform(4, NUM_EXPERTS, num_owners, num_owners * -(-NUM_EXPERTS // num_owners) * 2 - NUM_EXPERTS)
        self.table = copies_table(placement, 8).to(GPU)
        self.facts = torch.full((BAD_ANSWER + num_owners,), NONE, dtype=torch.int64)
        self.facts[KEY_SHIFT], self.facts[NUM_SLOTS] = 3, placement.slots_per_rank
        self.facts = self.facts.to(GPU)
        self.x = self.noise(num_tokens, hidden)
        ids = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(1)[:, :top_k].int()
        ids[torch.rand(ids.shape, generator=generator) < 0.4] = -1
        ids[::5] = -1
        ids[3::11, 0] = NUM_EXPERTS + 5
        self.ids = ids.to(GPU)

    def noise(self, *shape):
        return torch.randn(shape, generator=self.noise_generator, device=GPU).to(self.sizes.dtype)

    def both(self, call, *made):
        """`call(pack, facts, *out)` for both; returns pairs of what they made, facts first."""
        results = []
        for pack in self.packs:
            out = [self.facts.clone(), *[tensor.clone() for tensor in made]]
            call(pack, *out)
            results.append(out)
        torch.cuda.synchronize()
        return list(zip(*results, strict=True))


def turns_of(roles):
    return pytest.mark.parametrize(("roles", "row", "num_tokens"), [(r, *turn) for r in roles for turn in TURNS])


cases, owners_cases = turns_of(ROLES), turns_of([r for r in ROLES if r[3] >= 0])


def plan(case):
    """Places and counts of the exact form, the same from both."""
    num_owners, num_sources = case.sizes.num_owners, case.sizes.num_sources
    places = torch.zeros(num_owners, case.ids.shape[0], 2, dtype=torch.int32, device=GPU)
    counts = torch.zeros(num_owners + num_sources, 2, dtype=torch.int32, device=GPU)

    def call(pack, facts, places, counts):
        pack.count(case.ids, case.table, facts, places, counts, layer_id=LAYER)

    facts, places, counts = case.both(call, places, counts)
    assert facts[0].equal(facts[1])
    assert counts[0].equal(counts[1])
    assert places[0].equal(places[1])
    return places[0], counts[0]


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8)


def assert_same_messages(case, ours, wanted):
    """Slots and numbers everywhere, rows where an owner needs them."""
    at, top_k = case.sizes.row_bytes, case.sizes.top_k
    assert ours[:, at:].equal(wanted[:, at:])
    slots = wanted[:, at + 4 : at + 4 + 2 * top_k].contiguous().view(torch.int16)
    needed = (slots != -1).any(1)
    assert ours[needed, :at].equal(wanted[needed, :at])


@cases
@pytest.mark.parametrize("form", ["padded", "bounded", "exact"])
def test_rows_are_packed_as_in_torch(roles, row, num_tokens, form):
    case = Case(roles, row, num_tokens)
    sizes, places, counts, stride = case.sizes, None, None, num_tokens + 3
    bounded = form == "bounded"
    others = sizes.num_owners - (sizes.own_owner >= 0)
    own, num_messages = stride, others * stride
    if form == "exact":
        places, counts = plan(case)
        stride, sent = num_tokens, counts[: sizes.num_owners, 0].tolist()
        own = sent[sizes.own_owner] if sizes.own_owner >= 0 else 0
        num_messages = sum(sent) - own
    if num_tokens > 5:
        case.x[6, -1], case.x[5] = float("nan"), float("inf")  # 5 has no id: nobody asked for it
    owns = sizes.own_owner >= 0
    rows = torch.zeros(4 + own if owns else 0, sizes.hidden, dtype=sizes.dtype, device=GPU)
    made = (
        torch.zeros(num_messages, sizes.message_bytes, dtype=torch.uint8, device=GPU),
        rows,
        torch.zeros(rows.shape[0], sizes.top_k, dtype=torch.int32, device=GPU),
        torch.zeros(num_tokens, sizes.top_k, dtype=torch.int32, device=GPU),
        torch.zeros(sizes.num_owners, pairs_pitch(stride), dtype=torch.uint8, device=GPU),
    )

    def call(pack, facts, messages, rows, slots, where, pairs):
        pack.pack(
            case.x,
            case.ids,
            case.table,
            facts,
            messages,
            rows,
            slots,
            where,
            layer_id=LAYER,
            stride=stride,
            own_begin=2,
            places=places,
            counts=counts,
            pairs=pairs if bounded else None,
        )

    facts, messages, rows, slots, where, pairs = case.both(call, *made)
    assert where[0].equal(where[1])
    assert pairs[0].equal(pairs[1])
    assert pairs[0].sum() == ((where[1] >= 0).sum() if bounded else 0)
    assert facts[0].equal(facts[1])
    asked = num_tokens > 6 and bool((where[1][6] >= 0).any())
    assert facts[0][BAD_ROW] == (LAYER << 40 | 6 << 8 if asked else NONE)
    assert_same_messages(case, *messages)
    if owns:
        assert slots[0].equal(slots[1])
        needed = (slots[1] >= 0).any(1)
        needed[:2] = needed[2 + own :] = False
        assert as_bytes(rows[0][needed]).equal(as_bytes(rows[1][needed]))  # NaN is what it is


@owners_cases
def test_messages_are_unpacked_as_in_torch(roles, row, num_tokens):
    """Of a source that was not named, and own ones, nothing is read; a slot that is not here becomes none."""
    case = Case(roles, row, num_tokens)
    sizes = case.sizes
    stride = num_tokens + 2
    own = sizes.own_source * stride, (sizes.own_source + 1) * stride
    num_rows = sizes.num_sources * stride
    num_slots = int(case.facts[NUM_SLOTS])
    messages = torch.zeros(num_rows - stride, sizes.message_bytes, dtype=torch.uint8, device=GPU)
    messages[:, : sizes.row_bytes] = case.noise(len(messages), sizes.hidden).view(torch.uint8)
    slots = torch.randint(-1, num_slots + 2, (len(messages), sizes.top_k), generator=case.generator).to(torch.int16)
    slots[::3] = -1
    at = sizes.row_bytes + 4
    messages[:, at : at + 2 * sizes.top_k] = slots.to(GPU).view(torch.uint8)
    rows = torch.zeros(num_rows, sizes.hidden, dtype=sizes.dtype, device=GPU)
    slots = torch.full((num_rows, sizes.top_k), 77, dtype=torch.int32, device=GPU)
    pairs = torch.zeros(sizes.num_sources, pairs_pitch(stride), dtype=torch.uint8, device=GPU)
    everyone = (1 << sizes.num_sources) - 1
    silent = (sizes.own_source + 1) % sizes.num_sources
    for named, turn in ((everyone, stride), (everyone & ~(1 << silent), stride), (everyone, 0)):

        def call(pack, facts, rows, slots, pairs, named=named, turn=turn):
            counted = pairs if turn else None
            pack.unpack(messages, facts, rows, slots, own=own, stride=turn, named=named, pairs=counted)

        _, rows_of, slots_of, pairs_of = case.both(call, rows, slots, pairs)
        others = torch.arange(sizes.num_sources) != sizes.own_source
        assert pairs_of[0][others].equal(pairs_of[1][others])
        assert slots_of[0].equal(slots_of[1])
        assert (slots_of[0][own[0] : own[1]] == 77).all()
        needed = (slots_of[1] >= 0).any(1)
        needed[own[0] : own[1]] = False
        assert as_bytes(rows_of[0][needed]).equal(as_bytes(rows_of[1][needed]))
        if named != everyone:
            assert (slots_of[0][silent * stride : (silent + 1) * stride] == -1).all()


@owners_cases
def test_answers_are_packed_as_in_torch(roles, row, num_tokens):
    case = Case(roles, row, num_tokens)
    sizes = case.sizes
    num_rows = [num_tokens if s % 2 else num_tokens // 3 for s in range(sizes.num_sources)]
    slots = torch.randint(-1, 3, (sum(num_rows), sizes.top_k), generator=case.generator).int()
    counts = torch.zeros(sizes.num_owners + sizes.num_sources, 2, dtype=torch.int32)
    first = []
    for source, part in enumerate(slots.split(num_rows)):
        pairs = (part >= 0).sum(1)
        first.append((pairs.cumsum(0) - pairs).int())
        counts[sizes.num_owners + source] = torch.tensor([len(part), int(pairs.sum())])
    own_begin = sum(num_rows[: sizes.own_source])
    own = own_begin, own_begin + num_rows[sizes.own_source]
    others = torch.ones(sum(num_rows), dtype=torch.bool)
    others[own[0] : own[1]] = False
    messages = torch.zeros(int(others.sum()), sizes.message_bytes, dtype=torch.uint8)
    messages[:, sizes.row_bytes : sizes.row_bytes + 4] = (
        torch.cat(first)[others][:, None].contiguous().view(torch.uint8)
    )
    expert_rows = case.noise(sum(num_rows), sizes.top_k, sizes.hidden)
    num_answers = int((slots[others] >= 0).sum())
    answers = torch.zeros(num_answers, sizes.hidden, dtype=sizes.dtype, device=GPU)
    slots, messages, counts = slots.to(GPU), messages.to(GPU), counts.to(GPU)

    def call(pack, facts, answers):
        pack.pack_answers(expert_rows, slots, messages, counts, answers, own=own)

    _, answers = case.both(call, answers)
    assert answers[0].equal(answers[1])
    assert num_answers == 0 or answers[0].any()
    memory = torch.zeros(num_answers + 2 * sizes.top_k, sizes.hidden, dtype=sizes.dtype, device=GPU)
    for number in (num_answers - 1, 0x7F7F7F7F):  # as after an abort: nothing is written outside
        wild = torch.tensor([max(number, 0)], dtype=torch.int32, device=GPU).view(torch.uint8)
        messages[:, sizes.row_bytes : sizes.row_bytes + 4] = wild
        call(case.packs[0], case.facts, memory[:num_answers])
        assert not memory[num_answers:].any()


@owners_cases
def test_as_many_answers_are_packed_as_there_are_places_as_in_torch(roles, row, num_tokens):
    """Too few places, some too many; a source that is not named gets nothing, and nothing is written behind."""
    case = Case(roles, row, num_tokens)
    sizes, stride = case.sizes, num_tokens + 3
    slots = torch.randint(-1, 3, (sizes.num_sources * stride, sizes.top_k), generator=case.generator).int()
    slots[::7] = -1
    pairs = torch.full((sizes.num_sources, pairs_pitch(stride)), 99, dtype=torch.uint8)  # also where nobody may look
    pairs[:, :stride] = (slots >= 0).sum(1).view(-1, stride)
    slots, pairs = slots.to(GPU), pairs.to(GPU)
    expert_rows = case.noise(len(slots), sizes.top_k, sizes.hidden)
    most = int(pairs[:, :stride].sum(1).max())
    others, everyone = sizes.num_sources - (sizes.own_source >= 0), (1 << sizes.num_sources) - 1
    for bound in (1, max(1, most // 2), most + 5):
        for named in (everyone, everyone & ~1):
            memory = torch.zeros(others * bound + 8, sizes.hidden, dtype=sizes.dtype, device=GPU)

            def call(pack, facts, memory, bound=bound, named=named):
                answers = memory[: others * bound]
                pack.pack_bounded(expert_rows, slots, pairs, answers, stride=stride, bound=bound, named=named)

            _, answers = case.both(call, memory)
            assert answers[0].equal(answers[1])
            assert not answers[0][others * bound :].any()


@cases
@pytest.mark.parametrize("form", ["padded", "bounded", "exact"])
def test_answers_are_unpacked_as_in_torch(roles, row, num_tokens, form):
    case = Case(roles, row, num_tokens)
    sizes, stride = case.sizes, num_tokens + 3
    num_others = sizes.num_owners - (sizes.own_owner >= 0)
    num_answers, bound, pairs = num_others * stride * sizes.top_k, 0, None
    places, counts = plan(case)
    where = torch.full((num_tokens, sizes.top_k), -1, dtype=torch.int32, device=GPU)
    rows = torch.zeros(4 + num_tokens, sizes.hidden, dtype=sizes.dtype, device=GPU)
    messages = torch.zeros(sum(counts[:, 0].tolist()) + 4, sizes.message_bytes, dtype=torch.uint8, device=GPU)
    slots = torch.zeros(4 + num_tokens, sizes.top_k, dtype=torch.int32, device=GPU)
    case.packs[1].pack(
        case.x,
        case.ids,
        case.table,
        case.facts,
        messages,
        rows,
        slots,
        where,
        layer_id=LAYER,
        stride=stride,
        own_begin=2,
        places=places,
        counts=counts,
    )
    if form == "exact":
        sent = counts[: sizes.num_owners, 1].tolist()
        num_answers = sum(sent) - (sent[sizes.own_owner] if sizes.own_owner >= 0 else 0)
    else:
        places = counts = None
    if form == "bounded":  # the owner with most pairs has too few places
        owned = torch.stack([(where == owner).sum(1) for owner in range(sizes.num_owners)])
        pairs = torch.full((sizes.num_owners, pairs_pitch(stride)), 99, dtype=torch.uint8, device=GPU)
        pairs[:, :num_tokens] = owned
        bound = max(1, int(owned.sum(1).max()) * 3 // 4)
        num_answers = num_others * bound
    answers = case.noise(max(num_answers, 1), sizes.hidden)[:num_answers]
    if num_answers > 10:
        answers[num_answers // 2 : num_answers // 2 + 9, 0] = float("nan")
    if form == "padded":
        answers = answers.view(-1, sizes.top_k, sizes.hidden)
    expert_rows = case.noise(num_tokens + 4, sizes.top_k, sizes.hidden)
    expert_rows[-3] = float("inf")
    y = torch.zeros(num_tokens, sizes.top_k, sizes.hidden, dtype=sizes.dtype, device=GPU)

    def call(pack, facts, y):
        pack.unpack_answers(
            expert_rows,
            answers,
            where,
            facts,
            y,
            layer_id=LAYER,
            stride=stride,
            own_begin=2,
            places=places,
            counts=counts,
            pairs=pairs,
            bound=bound,
        )

    facts, y = case.both(call, y)
    assert facts[0].equal(facts[1])
    if form == "bounded" and num_tokens > 30:
        away = owned.sum(1)
        if sizes.own_owner >= 0:
            away[sizes.own_owner] = 0
        assert bool((facts[0][NO_PLACE] < NONE) == (away.max() > bound))
    assert as_bytes(y[0]).equal(as_bytes(y[1]))


def test_tensors_that_the_kernels_cannot_read_are_refused():
    case = Case(ROLES[0], WIDE, 5)
    nothing = torch.zeros(0, dtype=torch.uint8, device=GPU)
    with pytest.raises(KernelError, match=r"rows must be contiguous torch.bfloat16 \[any, 1032\]"):
        case.packs[0].pack(
            case.x.t(),
            case.ids,
            case.table,
            case.facts,
            nothing,
            nothing,
            nothing,
            nothing,
            layer_id=0,
            stride=5,
            own_begin=0,
        )
    with pytest.raises(KernelError, match="no kernel packs rows"):
        NcclPack(
            PackSizes(hidden=7, top_k=8, dtype=torch.bfloat16, num_sources=1, num_owners=1, own_source=0, own_owner=0),
            GPU,
        )


# ------------------------------------------------------------------------------------------------------- all together
@pytest.mark.parametrize("exact_above", [0, 64, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_finds_its_expert_and_comes_back(layout, exact_above):
    epoch = make_epoch(layout, redundant=5)
    shape = RowShape(hidden_size=1032, top_k=TOP_K, dtype=torch.bfloat16, device=GPU)
    exchanges, _ = nccl_emulated.make_exchanges(epoch, shape, exact_above=exact_above)
    pairs = exchange_emulated.run_ranks(
        len(exchanges), lambda rank: check_device(rank, epoch, exchanges[rank], shape), GPU
    )
    assert sum(pairs) > 500


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_has_a_place_or_its_source_is_told_and_the_whole_step_brings_it(layout):
    epoch = make_epoch(layout, redundant=5)
    shape = RowShape(hidden_size=1032, top_k=TOP_K, dtype=torch.bfloat16, device=GPU)
    exchanges, _ = nccl_emulated.make_exchanges(epoch, shape, bounded=True)
    results = exchange_emulated.run_ranks(
        len(exchanges), lambda rank: check_bounded(rank, epoch, exchanges[rank], shape), GPU
    )
    assert sum(pairs for pairs, _ in results) > 500
    assert (sum(num for _, num in results) > 0) == (len(epoch.expert_ranks) > 1)


@pytest.mark.parametrize("hidden", [7, 40])
def test_rows_without_a_kernel_go_in_plain_torch_and_it_is_said(hidden, caplog):
    epoch = make_epoch("2 colocated", redundant=5)
    shape = RowShape(hidden_size=hidden, top_k=TOP_K, dtype=torch.float32, device=GPU)
    with caplog.at_level("WARNING"):
        exchanges, _ = nccl_emulated.make_exchanges(epoch, shape)
    assert bool(caplog.records) == (hidden == 7)
    pairs = exchange_emulated.run_ranks(2, lambda rank: check_device(rank, epoch, exchanges[rank], shape), GPU)
    assert sum(pairs) > 500


@pytest.mark.parametrize("exact_above", [0, 64])
def test_what_is_not_finite_is_named_by_layer_token_and_who_made_it(exact_above):
    epoch = make_epoch("2 colocated")
    shape = RowShape(hidden_size=24, top_k=TOP_K, dtype=torch.bfloat16, device=GPU)
    exchanges, _ = nccl_emulated.make_exchanges(epoch, shape, exact_above=exact_above)
    x, ids = (([part.to(GPU) for part in some]) for some in draw(5))
    x[1][3, 23] = float("nan")
    (_, first, _), (_, second, _) = one_turn(exchanges, epoch, x, ids, layer_id=2)
    assert first.bad == ()
    (bad,) = second.bad
    assert (bad.direction, bad.source, bad.layer_id, bad.row) == (Direction.DISPATCH, 1, 2, 3)
    x[1][3, 23] = 0.0
    for source, (_, verdict, _) in enumerate(one_turn(exchanges, epoch, x, ids, layer_id=3, scale=float("inf"))):
        assert {(bad.direction, bad.source, bad.layer_id) for bad in verdict.bad} == {(Direction.RETURN, source, 3)}
        assert min(bad.row for bad in verdict.bad) == 0
    assert [verdict.bad for _, verdict, _ in one_turn(exchanges, epoch, x, ids)] == [(), ()]
