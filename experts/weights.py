"""Read only this shard's experts into the tensors that `mlp.py` multiplies by.

The final tensors are allocated first and every slice is read straight into its place (converted piece by piece
where the dtype differs), so a shard's memory grows by the bytes of its own experts and not by what the files hold.
An expert that is resident already (an older placement, a second copy in the same layer) is copied from memory
instead of read again; one that a peer has comes from its memory (`copies.py`). Experts may be stored singly
(`experts.E.gate_proj.weight` ...) or fused (`experts.gate_up_proj` [experts, 2 * width, hidden], gate first, and
`experts.down_proj` [experts, hidden, width]; transformers' own layout in memory)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..checkpoint import Checkpoint, ProgressMeter
from ..model_config import ModelConfig
from ..parallel_reads import Read, read_all

_ROOM = 0.85  # of a shard's memory is for experts

Fetch = Callable[[int, torch.Tensor, torch.Tensor], bool]  # (logical expert, its w13, w2): whether they were filled


@dataclass(frozen=True, slots=True, eq=False)
class LayerExperts:
    """The experts of one layer on this rank, by slot."""

    logical_ids: tuple[int, ...]  # expert in each slot, -1 = empty
    w13: torch.Tensor  # [num_slots, 2 * moe_intermediate_size, hidden_size], gate first
    w2: torch.Tensor  # [num_slots, hidden_size, moe_intermediate_size]
    w13_t: tuple[torch.Tensor, ...]  # by slot, a view [hidden, 2 * width] of w13
    w2_t: tuple[torch.Tensor, ...]  # by slot, a view [width, hidden] of w2


def load_layer(
    checkpoint: Checkpoint,
    layer_id: int,
    logical_ids: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    resident: Sequence[LayerExperts] = (),
    fetch: Fetch | None = None,
    meter: ProgressMeter | None = None,
) -> LayerExperts:
    """The experts `logical_ids` of one layer, slot by slot; from `resident` where they are there, else by `fetch`."""
    config = checkpoint.config
    hidden, width, num_slots = config.hidden_size, config.moe_intermediate_size, len(logical_ids)
    w13 = torch.empty(num_slots, 2 * width, hidden, dtype=dtype, device=device)
    w2 = torch.empty(num_slots, hidden, width, dtype=dtype, device=device)
    made = LayerExperts(
        tuple(int(i) for i in logical_ids), w13, w2, tuple(w13.transpose(1, 2)), tuple(w2.transpose(1, 2))
    )
    for slot, logical in enumerate(made.logical_ids):
        if logical < 0:
            w13[slot].zero_()
            w2[slot].zero_()
            continue
        source = _find(logical, made, slot, resident)
        if source is None and fetch is not None and fetch(logical, w13[slot], w2[slot]):
            if meter is not None:
                meter.add(expert_bytes_on_disk(checkpoint, layer_id))
        elif source is None:
            read_expert(checkpoint, layer_id, logical, w13[slot], w2[slot], meter)
        else:
            experts, its_slot = source
            w13[slot].copy_(experts.w13[its_slot])
            w2[slot].copy_(experts.w2[its_slot])
            if meter is not None:
                meter.add(expert_bytes_on_disk(checkpoint, layer_id))
    return made


def expert_bytes_on_disk(checkpoint: Checkpoint, layer_id: int) -> int:
    """Bytes of one expert of this layer in the files."""
    fused = f"model.layers.{layer_id}.mlp.experts.gate_up_proj"
    if fused in checkpoint:
        down = f"model.layers.{layer_id}.mlp.experts.down_proj"
        return (checkpoint.entry(fused).num_bytes + checkpoint.entry(down).num_bytes) // checkpoint.config.num_experts
    return sum(checkpoint.linear_bytes(name) for name in _single_names(layer_id, 0).values())


def least_shards(checkpoint: Checkpoint, memory_bytes: int, *, dtype: torch.dtype | None) -> int:
    """Fewest shards of so much memory each that hold one copy of every expert. `dtype`: None = as stored."""
    config = checkpoint.config
    one = 3 * config.hidden_size * config.moe_intermediate_size * dtype.itemsize if dtype is not None else 0
    total = sum(one or expert_bytes_on_disk(checkpoint, layer_id) for layer_id in config.moe_layer_ids)
    return max(1, -(-total * config.num_experts // int(_ROOM * memory_bytes)))


def expert_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(K, N) of the two products of an expert, for the self-test of `numerics.py`."""
    if not config.moe_layer_ids:
        return []
    hidden, width = config.hidden_size, config.moe_intermediate_size
    return [(hidden, 2 * width), (width, hidden)]


def read_expert(
    checkpoint: Checkpoint,
    layer_id: int,
    logical: int,
    w13: torch.Tensor,
    w2: torch.Tensor,
    meter: ProgressMeter | None = None,
) -> None:
    """One expert of one layer straight into w13 [2 * width, hidden] and w2 [hidden, width]."""
    read_all(checkpoint, _reads(checkpoint, layer_id, logical, w13, w2), meter=meter, num_threads=1)


def load_stack(
    checkpoint: Checkpoint,
    layer_id: int,
    logical_ids: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    meter: ProgressMeter | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """w13 and w2 of these experts, read at once; for `device_experts.py`, which packs them."""
    hidden, width, num = checkpoint.config.hidden_size, checkpoint.config.moe_intermediate_size, len(logical_ids)
    w13 = torch.empty(num, 2 * width, hidden, dtype=dtype, device=device)
    w2 = torch.empty(num, hidden, width, dtype=dtype, device=device)
    reads = [
        read for i, logical in enumerate(logical_ids) for read in _reads(checkpoint, layer_id, logical, w13[i], w2[i])
    ]
    read_all(checkpoint, reads, meter=meter)
    return w13, w2


def _reads(checkpoint: Checkpoint, layer_id: int, logical: int, w13: torch.Tensor, w2: torch.Tensor) -> list[Read]:
    fused = f"model.layers.{layer_id}.mlp.experts."
    if fused + "gate_up_proj" in checkpoint:
        return [Read(fused + "gate_up_proj", w13, logical), Read(fused + "down_proj", w2, logical)]
    width = w2.shape[1]
    names = _single_names(layer_id, logical)
    return [Read(names["gate"], w13[:width]), Read(names["up"], w13[width:]), Read(names["down"], w2)]


def _single_names(layer_id: int, logical: int) -> Mapping[str, str]:
    prefix = f"model.layers.{layer_id}.mlp.experts.{logical}."
    return {part: f"{prefix}{part}_proj.weight" for part in ("gate", "up", "down")}


def _find(
    logical: int, made: LayerExperts, num_done: int, resident: Sequence[LayerExperts]
) -> tuple[LayerExperts, int] | None:
    """Where this expert is in memory already: in a slot just filled, or in an older placement's tensors."""
    if logical in made.logical_ids[:num_done]:
        return made, made.logical_ids.index(logical)
    for experts in resident:
        if logical in experts.logical_ids:
            return experts, experts.logical_ids.index(logical)
    return None
