"""What every back end of the exchange must do, as one suite: the same cases, run by each rank of a real membership.

A back end joins by a line in test_exchange.py (rows in host memory, `check`) or test_exchange_gpu.py (rows on a device,
`check_device`): how to make its exchange for an epoch and a rank."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from expertmesh.router.device_exchange import DeviceExchange
from expertmesh.router.dispatch import plan
from expertmesh.router.epoch import WHOLE, Epoch, Member, StepHeader
from expertmesh.router.exchange import Exchange, RowShape
from expertmesh.router.placement import Placement, uniform

NUM_LAYERS, NUM_EXPERTS, TOP_K = 4, 12, 4
LAYERS = (0, 2, 3)
LAYOUTS = {  # name -> roles of the ranks: a = attention, e = experts, b = both
    "one rank": "b",
    "1 attention + 1 shard": "ae",
    "1 attention + 2 shards": "aee",
    "2 attention + 2 shards": "aaee",
    "2 colocated": "bb",
    "4 colocated": "bbbb",
    "mixed": "eabe",
}


@dataclass(frozen=True)
class Case:
    """`tokens(source index)` = rows allowed by the header; `sent` of them are sent; `ids` names the routing."""

    name: str
    tokens: Callable[[int], int]
    ids: str = "random"
    sent: float = 1.0


CASES = (
    Case("even", lambda source: 5),
    Case("uneven", lambda source: 1 + 7 * source),
    Case("one token", lambda source: 1),
    Case("many tokens", lambda source: 130 + source),
    Case("one source silent", lambda source: 3 * (source > 0 or 1) if source != 1 else 0),
    Case("all to one expert", lambda source: 6, "one"),
    Case("all to the last rank", lambda source: 6, "last"),
    Case("ids of -1", lambda source: 9, "holes"),
    Case("no id at all", lambda source: 4, "none"),
    Case("fewer rows than the header allows", lambda source: 20, sent=0.3),
    Case("no rows though named", lambda source: 3, sent=0.0),
)


def make_epoch(layout: str, redundant: int = 0, **fields: object) -> Epoch:
    roles = LAYOUTS[layout]
    members = tuple(Member(member_id=f"m{i}", attention=r in "ab", expert=r in "eb") for i, r in enumerate(roles))
    num_expert_ranks = sum(m.expert for m in members)
    placement = uniform(NUM_LAYERS, NUM_EXPERTS, num_expert_ranks, redundant, moe_layers=LAYERS)
    return Epoch(number=1, members=members, placement=placement, **fields)  # type: ignore[arg-type]


def make_ids(case: Case, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """[num_tokens, TOP_K] int32, distinct within a token."""
    ids = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(1)[:, :TOP_K].to(torch.int32)
    if case.ids == "one":
        ids[:, :1], ids[:, 1:] = 0, -1
    elif case.ids == "last":
        ids[:] = torch.arange(NUM_EXPERTS - TOP_K, NUM_EXPERTS, dtype=torch.int32)
    elif case.ids == "holes":
        ids[torch.rand(num_tokens, TOP_K, generator=generator) < 0.4] = -1
    elif case.ids == "none":
        ids[:] = -1
    return ids


def multiply(rows: torch.Tensor, slot_ids: torch.Tensor, logical: torch.Tensor, layer_id: int) -> torch.Tensor:
    """What an expert does here: a product that tells layer and expert apart. One row per (row, k) with an id."""
    row, k = (slot_ids >= 0).nonzero(as_tuple=True)
    expert = logical[slot_ids[row, k].long()]
    assert bool((expert >= 0).all()), "rows were sent to an empty slot"
    return rows[row] * factor(expert, layer_id).to(rows.dtype)[:, None]


def factor(expert: torch.Tensor, layer_id: int) -> torch.Tensor:
    """Small enough to be exact in bf16."""
    return 1 + expert + 16 * layer_id


def headers(epoch: Epoch) -> Iterator[tuple[Case, StepHeader]]:
    """One step a case, where anybody sends anything."""
    for step_id, case in enumerate(CASES, start=1):
        num_tokens = [0] * len(epoch.members)
        for index, source in enumerate(epoch.attention_ranks):
            num_tokens[source] = case.tokens(index)
        if any(num_tokens):
            yield case, StepHeader(step_id=step_id, epoch=1, placement_version=1, num_tokens=tuple(num_tokens))


def check(rank: int, epoch: Epoch, exchange: Exchange, shape: RowShape) -> int:
    """Run all cases as this rank; returns the number of pairs that came back here."""
    pairs = 0
    for case, header in headers(epoch):
        if epoch.members[rank].expert or header.num_tokens[rank]:
            pairs += _check_step(rank, epoch, exchange, shape, header, case)
    return pairs


def _check_step(rank: int, epoch: Epoch, exchange: Exchange, shape: RowShape, header: StepHeader, case: Case) -> int:
    placement: Placement = epoch.placement
    generator = torch.Generator().manual_seed(1000 * header.step_id + rank)
    ep_rank = epoch.expert_ranks.index(rank) if rank in epoch.expert_ranks else -1
    pairs = 0
    exchange.begin(header, placement.moe_layers)
    for layer_id in placement.moe_layers:
        source_plan = x = ids = None
        if header.num_tokens[rank]:
            sent = int(header.num_tokens[rank] * case.sent)
            x = torch.randn(sent, shape.hidden_size, generator=generator).to(shape.dtype)
            ids = make_ids(case, sent, generator)
            source_plan = plan(ids, placement, layer_id, rank)
        handle = exchange.dispatch(layer_id, source_plan, x)
        assert handle.rows.shape[0] == handle.slot_ids.shape[0] == sum(c[1] for c in handle.source_counts)
        assert int((handle.slot_ids >= 0).sum()) == sum(c[2] for c in handle.source_counts)
        assert [c[0] for c in handle.source_counts] == ([] if ep_rank < 0 else list(header.sources)), case.name
        produced = handle.rows[:0]
        if ep_rank >= 0:
            produced = multiply(handle.rows, handle.slot_ids, placement.local_slots(layer_id, ep_rank), layer_id)
        returned = exchange.combine(produced, handle)
        assert (returned is None) == (source_plan is None)
        if source_plan is not None:
            assert returned is not None
            assert x is not None
            assert ids is not None
            token, k = np.divmod(source_plan.return_slots, TOP_K)
            wanted = factor(ids[token, k], layer_id).to(shape.dtype)[:, None]
            assert returned.shape == (source_plan.num_pairs, shape.hidden_size)
            assert returned.equal(x[token] * wanted), f"{case.name}: layer {layer_id} came back wrong on rank {rank}"
            assert source_plan.num_pairs == int((ids >= 0).sum())
            pairs += source_plan.num_pairs
    assert list(exchange.verify()) == []
    return pairs


def check_device(rank: int, epoch: Epoch, exchange: DeviceExchange, shape: RowShape, *, bucket: int = 0) -> int:
    """The same cases on device tensors. `bucket`: rows of a turn, 0 = as many as the largest source has; tokens beyond
    that go in a second part. Returns the number of pairs that came back here."""
    exchange.use_placement(epoch.placement)
    pairs = 0
    for case, header in headers(epoch):
        if epoch.members[rank].expert or header.num_tokens[rank]:
            returned = _check_device_step(rank, epoch, exchange, shape, header, case, bucket)
            assert returned is not None, f"{case.name}: answers without a place"
            pairs += returned
    return pairs


def check_bounded(
    rank: int, epoch: Epoch, exchange: DeviceExchange, shape: RowShape, *, bucket: int = 0
) -> tuple[int, int]:
    """The same cases where answers may have no place: then a rank says so, and whoever does not got all of its own.
    Every case runs again as a whole step, in which each has one. Returns pairs that came back here, and the steps whose
    answers had no place."""
    exchange.use_placement(epoch.placement)
    pairs = num_overflows = 0
    for case, header in headers(epoch):
        if epoch.members[rank].expert or header.num_tokens[rank]:
            for step in (header, replace(header, flags=WHOLE)):
                returned = _check_device_step(rank, epoch, exchange, shape, step, case, bucket)
                assert returned is not None or not step.flags, case.name
                pairs, num_overflows = pairs + (returned or 0), num_overflows + (returned is None)
    return pairs, num_overflows


def _check_device_step(
    rank: int,
    epoch: Epoch,
    exchange: DeviceExchange,
    shape: RowShape,
    header: StepHeader,
    case: Case,
    bucket: int,
) -> int | None:
    """Pairs that came back, all of them right; None = the exchange says that some had no place."""
    placement = epoch.placement
    generator = torch.Generator().manual_seed(1000 * header.step_id + rank)
    ep_rank = epoch.expert_ranks.index(rank) if rank in epoch.expert_ranks else -1
    most = max(header.num_tokens)
    stride = bucket if bucket else most
    exchange.begin(header, stride=stride, attempt=0)
    checks: list[tuple[torch.Tensor, torch.Tensor, int]] = []  # looked at when the step is over
    for layer_id in placement.moe_layers:
        sent = int(header.num_tokens[rank] * case.sent)
        x = torch.randn(sent, shape.hidden_size, generator=generator).to(shape.dtype).to(shape.device)
        ids = make_ids(case, sent, generator).to(shape.device)
        for part in range(-(-most // stride)):
            mine = slice(min(sent, part * stride), min(sent, (part + 1) * stride))
            is_source = header.num_tokens[rank] > 0
            rows, slot_ids = exchange.dispatch(
                layer_id, x[mine] if is_source else None, ids[mine] if is_source else None, stride
            )
            assert rows.shape == (slot_ids.shape[0], shape.hidden_size)
            produced = rows.new_empty(0, TOP_K, shape.hidden_size)
            if ep_rank >= 0:
                logical = placement.local_slots(layer_id, ep_rank).to(shape.device)
                produced = multiply_all(rows, slot_ids, logical, layer_id)
            returned = exchange.combine(produced)
            assert (returned is None) == (not is_source)
            if returned is not None:
                assert returned.shape == (x[mine].shape[0], TOP_K, shape.hidden_size)
                wanted = x[mine][:, None] * factor(ids[mine], layer_id).to(shape.dtype)[:, :, None]
                exists = (ids[mine] >= 0)[:, :, None]
                checks.append((torch.where(exists, returned, 0), torch.where(exists, wanted, 0), layer_id))
    exchange.end()
    if shape.device.type == "cuda":
        torch.cuda.current_stream(shape.device).synchronize()
    verdict = exchange.verdict()
    assert verdict.bad == ()
    if verdict.overflow >= 0:
        return None
    for returned, wanted, layer_id in checks:
        assert returned.equal(wanted), f"{case.name}: layer {layer_id} came back wrong on rank {rank}"
    return int(sum((wanted.abs().amax(-1) > 0).sum() for _, wanted, _ in checks))


def multiply_all(rows: torch.Tensor, slot_ids: torch.Tensor, logical: torch.Tensor, layer_id: int) -> torch.Tensor:
    """`multiply` as on a device: a row for every pair, NaN where there is none."""
    expert = logical[slot_ids.clamp(min=0).long()]
    products = rows[:, None] * factor(expert, layer_id).to(rows.dtype)[:, :, None]
    is_bad = (slot_ids < 0) | (expert < 0)  # an empty slot must never be asked: it makes NaN, which is told
    return torch.where(is_bad[:, :, None], float("nan"), products)
