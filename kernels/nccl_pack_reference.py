"""What nccl_pack.cu does, in plain torch: the exchange's path on CPUs and for shapes without a kernel, and what the
kernels are checked against. The padded form asks no device for a number; the bounded and the exact one may."""

import torch

from .nccl_pack import BAD_ANSWER, BAD_ROW, KEY_SHIFT, NO_PLACE, NONE, NUM_SLOTS, PackSizes


def owners_and_slots(
    topk_ids: torch.Tensor, copies: torch.Tensor, key: int | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each (token, k) goes by one layer's table [num_logical, width]: ep_rank and local slot there, [T, top_k]
    int32, -1 none."""
    num_logical = copies.shape[0]
    inside = (topk_ids >= 0) & (topk_ids < num_logical)
    ids = topk_ids.clamp(0, num_logical - 1).long()
    count = copies[ids, 0]
    tokens = torch.arange(topk_ids.shape[0], device=topk_ids.device)[:, None]
    place = copies[ids, 1 + (key + tokens + ids) % count.clamp(min=1)]
    none = torch.full_like(place, -1)
    exists = inside & (count > 0)
    return torch.where(exists, place >> 16, none), torch.where(exists, place & 0xFFFF, none)


class TorchPack:
    """The methods of `NcclPack`."""

    def __init__(self, sizes: PackSizes) -> None:
        self._sizes = sizes

    def count(
        self,
        ids: torch.Tensor,
        table: torch.Tensor,
        facts: torch.Tensor,
        places: torch.Tensor,
        counts: torch.Tensor,
        *,
        layer_id: int,
    ) -> None:
        sizes = self._sizes
        where, _ = owners_and_slots(ids, table[layer_id], facts[KEY_SHIFT])
        here = where == torch.arange(sizes.num_owners, device=ids.device)[:, None, None]  # [owners, T, top_k]
        mine = torch.stack([here.any(2).long(), here.sum(2)], 2)  # rows and pairs
        places.copy_(mine.cumsum(1) - mine)
        counts[: sizes.num_owners] = mine.sum(1)
        if sizes.own_owner >= 0:
            counts[sizes.num_owners + sizes.own_source] = counts[sizes.own_owner]

    def pack(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        table: torch.Tensor,
        facts: torch.Tensor,
        messages: torch.Tensor,
        rows: torch.Tensor,
        slots: torch.Tensor,
        where: torch.Tensor,
        *,
        layer_id: int,
        stride: int,
        own_begin: int,
        places: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
        pairs: torch.Tensor | None = None,
    ) -> None:
        sizes, num = self._sizes, x.shape[0]
        owners, local = owners_and_slots(ids, table[layer_id], facts[KEY_SHIFT])
        where.copy_(owners)
        base = 0
        for owner in range(sizes.num_owners):
            if places is None:
                mine = local.new_full((stride, sizes.top_k), -1)
                mine[:num] = torch.where(owners == owner, local, -1)
                sent, first = x, None
            else:
                needed = (owners == owner).any(1)
                mine, sent = torch.where(owners == owner, local, -1)[needed], x[needed]
                first = places[owner, :, 1][needed].contiguous()
            if owner == sizes.own_owner:
                rows[own_begin : own_begin + len(sent)] = sent
                slots[own_begin : own_begin + len(mine)] = mine
                continue
            part = messages[base : base + len(mine)]
            base += len(mine)
            at = sizes.row_bytes
            part[: len(sent), :at] = sent.contiguous().view(torch.uint8)
            part[:, at : at + 4] = 0 if first is None else first.view(torch.uint8).view(-1, 4)
            part[:, at + 4 : at + 4 + 2 * sizes.top_k] = mine.to(torch.int16).view(torch.uint8)
        if pairs is not None:
            pairs[:, :num] = (owners == torch.arange(sizes.num_owners, device=x.device)[:, None, None]).sum(2)
        sick = ~torch.isfinite(x).all(1) & (owners >= 0).any(1)
        _keep_first(facts[BAD_ROW], sick[:, None], layer_id)

    def unpack(
        self,
        messages: torch.Tensor,
        facts: torch.Tensor,
        rows: torch.Tensor,
        slots: torch.Tensor,
        *,
        own: tuple[int, int],
        stride: int,
        named: int,
        pairs: torch.Tensor | None = None,
    ) -> None:
        sizes, (begin, end) = self._sizes, own
        at = sizes.row_bytes
        came = messages[:, at + 4 : at + 4 + 2 * sizes.top_k].contiguous().view(torch.int16).int() & 0xFFFF
        came = torch.where(came < facts[NUM_SLOTS], came, -1)
        for to, part in ((slice(0, begin), slice(0, begin)), (slice(end, None), slice(begin, None))):
            rows.view(torch.uint8)[to] = messages[part, :at]
            slots[to] = came[part]
        for source in range(sizes.num_sources if stride else 0):
            if not named >> source & 1:
                slots[source * stride : (source + 1) * stride] = -1
        if pairs is not None:
            pairs[:, :stride] = (slots >= 0).sum(1).view(-1, stride)

    def pack_answers(
        self,
        expert_rows: torch.Tensor,
        slots: torch.Tensor,
        messages: torch.Tensor,
        counts: torch.Tensor,
        answers: torch.Tensor,
        *,
        own: tuple[int, int],
    ) -> None:
        wanted = slots >= 0
        wanted[own[0] : own[1]] = False
        answers.copy_(expert_rows[wanted])  # by source, row, k: the order of what they sent

    def pack_bounded(
        self,
        expert_rows: torch.Tensor,
        slots: torch.Tensor,
        pairs: torch.Tensor,
        answers: torch.Tensor,
        *,
        stride: int,
        bound: int,
        named: int,
    ) -> None:
        sizes = self._sizes
        others = [source for source in range(sizes.num_sources) if source != sizes.own_source]
        for i, source in enumerate(others):
            if named >> source & 1:
                part = slice(source * stride, (source + 1) * stride)
                made = expert_rows[part][slots[part] >= 0][:bound]
                answers[i * bound : i * bound + len(made)] = made

    def unpack_answers(
        self,
        expert_rows: torch.Tensor,
        answers: torch.Tensor,
        where: torch.Tensor,
        facts: torch.Tensor,
        y: torch.Tensor,
        *,
        layer_id: int,
        stride: int,
        own_begin: int,
        places: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
        pairs: torch.Tensor | None = None,
        bound: int = 0,
    ) -> None:
        sizes, num = self._sizes, y.shape[0]
        base = 0
        for owner in range(sizes.num_owners):
            here = where == owner
            is_own = owner == sizes.own_owner
            if pairs is not None and not is_own:
                token, k = here.nonzero(as_tuple=True)
                made = answers[base : base + bound][: len(token)]
                y[token, k] = torch.cat([made, made.new_zeros(len(token) - len(made), sizes.hidden)])
                lost = here & (here.flatten().cumsum(0).view(here.shape) > bound)
                _keep_first(facts[NO_PLACE], lost, layer_id)
                base += bound
            elif places is None:
                made = expert_rows[own_begin : own_begin + num] if is_own else answers[base : base + num]
                y.copy_(torch.where(here[:, :, None], made, y))
                base += 0 if is_own else stride
            elif is_own:
                token, k = here.nonzero(as_tuple=True)
                y[token, k] = expert_rows[own_begin + places[owner, token, 0].long(), k]
            else:
                num_pairs = int(here.sum())
                y[here] = answers[base : base + num_pairs]
                base += num_pairs
        sick = ~torch.isfinite(y).all(2)
        for owner in range(sizes.num_owners):
            _keep_first(facts[BAD_ANSWER + owner], sick & (where == owner), layer_id)


def _keep_first(first: torch.Tensor, sick: torch.Tensor, layer_id: int) -> None:
    """`sick` [T, k] bool; `first` the least key so far."""
    if sick.numel():
        token = torch.arange(sick.shape[0], device=sick.device)[:, None]
        keys = layer_id << 40 | token << 8 | torch.arange(sick.shape[1], device=sick.device)
        first.copy_(torch.minimum(first, torch.where(sick, keys, NONE).min()))
