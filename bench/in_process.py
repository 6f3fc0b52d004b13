"""A whole model in one process: attention tier, and N expert shards behind a StepContext that routes rows like a mesh.

The smallest real thing that turns tokens into logits: real dispatch plans, real shards with their own placements and
weights, real paged KV; only the wires are missing. Parity runs, kernels' checks and tests are built on it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..checkpoint import Checkpoint
from ..cluster.attention.batch import StepBatch
from ..cluster.attention.model import Model
from ..experts.mlp import LocalExpertMLP
from ..router.contracts import StepContext
from ..router.dispatch import plan as plan_dispatch
from ..router.epoch import StepHeader
from ..router.exchange import weighted_sum
from ..router.placement import Placement, uniform


@dataclass(slots=True, eq=False)
class Stream:
    """One sequence with pages of its own."""

    tokens: list[int]
    block_ids: list[int]
    num_computed: int = 0
    last_logits: torch.Tensor | None = field(default=None, repr=False)


class InProcessStep:
    """StepContext over shards that live here: rows are dispatched to every shard and combined in top-k order.

    `num_other_rows` adds that many random rows of "another attention replica" to what every shard gets, in front."""

    def __init__(self, shards: Sequence[LocalExpertMLP], placement: Placement, num_other_rows: int = 0) -> None:
        self.shards, self.placement, self.num_other_rows = shards, placement, num_other_rows
        self.header = StepHeader(step_id=0, epoch=0, placement_version=placement.version, num_tokens=(1,))
        self.exchange_s = self.expert_s = 0.0

    def moe(self, layer_id: int, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        plan = plan_dispatch(topk_ids, self.placement, layer_id)
        returned, first = [], 0
        for ep_rank, (shard, count) in enumerate(zip(self.shards, plan.send_counts)):
            rows = x[torch.from_numpy(plan.row_to_token[first : first + count])]
            slot_ids = torch.from_numpy(np.ascontiguousarray(plan.row_slot_ids[first : first + count]))
            returned.append(self._forward(shard, layer_id, ep_rank, rows, slot_ids))
            first += count
        return weighted_sum(torch.cat(returned), plan, topk_weights)

    def _forward(
        self, shard: LocalExpertMLP, layer_id: int, ep_rank: int, rows: torch.Tensor, slot_ids: torch.Tensor
    ) -> torch.Tensor:
        if not self.num_other_rows:
            return shard.forward(layer_id, rows, slot_ids)
        other = torch.randn(self.num_other_rows, rows.shape[1])
        held = (self.placement.local_slots(layer_id, ep_rank) >= 0).nonzero().flatten().to(torch.int32)
        their_ids = held[torch.randint(0, len(held), (self.num_other_rows, slot_ids.shape[1]))]
        out = shard.forward(layer_id, torch.cat([other, rows]), torch.cat([their_ids, slot_ids]))
        return out[their_ids.numel() :]

    def serve(self) -> None:
        raise NotImplementedError("every rank is in this process")


class InProcessModel:
    """Model, shards and a KV pool; `run` executes one step of any mix of streams."""

    def __init__(
        self,
        folder: str | Path,
        *,
        num_shards: int = 1,
        placement: Placement | None = None,
        experts_elsewhere: bool = False,
        batch_invariant: bool = True,
        num_blocks: int = 512,
        block_size: int = 16,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        checkpoint = Checkpoint(folder)
        config = checkpoint.config
        self.config, self.block_size = config, block_size
        self.model = Model.load(checkpoint, batch_invariant=batch_invariant, block_size=block_size, kv_dtype=kv_dtype)
        self.kv_cache = self.model.new_kv_cache(num_blocks)
        self.free_blocks = list(range(num_blocks))
        self.placement = placement or uniform(
            config.num_layers, config.num_experts, num_shards, moe_layers=config.moe_layer_ids
        )
        numerics = None if batch_invariant else self.model.numerics
        num_local = 0 if experts_elsewhere else self.placement.ep_size
        self.shards = [LocalExpertMLP(checkpoint, numerics) for _ in range(num_local)]
        self.num_other_rows = 0
        for ep_rank, shard in enumerate(self.shards):
            shard.set_placement(self.placement, ep_rank)

    def open(self, tokens: Sequence[int], *, num_tokens: int = 0) -> Stream:
        """A stream with pages for `num_tokens` tokens in all (at least its prompt)."""
        count = -(-max(num_tokens, len(tokens)) // self.block_size)
        return Stream(list(tokens), [self.free_blocks.pop() for _ in range(count)])

    def close(self, stream: Stream) -> None:
        self.free_blocks += stream.block_ids
        stream.block_ids = []

    def step(self, num_tokens: int = 0) -> StepContext:
        """The experts' side of one step over so many tokens; another one is a subclass's choice."""
        return InProcessStep(self.shards, self.placement, self.num_other_rows)

    def run(self, work: Sequence[tuple[Stream, int]], *, all_rows: bool = False) -> list[torch.Tensor]:
        """One step: the next n tokens of each stream. Logits of each stream's last (or of every) new token."""
        batch = self._batch(work, all_rows)
        logits = self.model.forward(batch, self.kv_cache, self.step(batch.num_tokens))
        for stream, count in work:
            stream.num_computed += count
        return list(logits.split([count if all_rows else 1 for _, count in work]))

    def greedy(self, prompts: Sequence[Sequence[int]], num_new: int) -> list[list[int]]:
        """Each prompt continued greedily, all in one running batch."""
        streams = [self.open(prompt, num_tokens=len(prompt) + num_new) for prompt in prompts]
        work = [(stream, len(stream.tokens)) for stream in streams]
        for _ in range(num_new):
            for (stream, _), logits in zip(work, self.run(work)):
                stream.tokens.append(int(logits[0].argmax()))
            work = [(stream, 1) for stream in streams]
        for stream in streams:
            self.close(stream)
        return [stream.tokens[len(prompt) :] for stream, prompt in zip(streams, prompts)]

    def _batch(self, work: Sequence[tuple[Stream, int]], all_rows: bool) -> StepBatch:
        q_lens = np.array([count for _, count in work], dtype=np.int32)
        starts = np.array([stream.num_computed for stream, _ in work])
        cu_seqlens_q = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
        table = np.full((len(work), max(len(stream.block_ids) for stream, _ in work)), -1, dtype=np.int32)
        for row, (stream, _) in enumerate(work):
            table[row, : len(stream.block_ids)] = stream.block_ids
        request = np.repeat(np.arange(len(work)), q_lens)
        positions = np.arange(len(request)) - cu_seqlens_q[request] + starts[request]
        slots = table[request, positions // self.block_size].astype(np.int64) * self.block_size
        tokens = [t for stream, n in work for t in stream.tokens[stream.num_computed : stream.num_computed + n]]
        last = cu_seqlens_q[1:].astype(np.int64) - 1
        return StepBatch(
            token_ids=torch.tensor(tokens, dtype=torch.int64),
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(slots + positions % self.block_size),
            q_lens=torch.from_numpy(q_lens),
            seq_lens=torch.from_numpy((starts + q_lens).astype(np.int32)),
            cu_seqlens_q=torch.from_numpy(cu_seqlens_q),
            block_table=torch.from_numpy(table),
            logits_rows=torch.from_numpy(np.arange(len(request)) if all_rows else last),
        )
