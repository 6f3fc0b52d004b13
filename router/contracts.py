"""The seam between the engine and the mesh: two small protocols, so that each is tested with a real small other half."""

from typing import Protocol

import torch

from .epoch import StepHeader


class StepContext(Protocol):
    """One step on this rank, given by `Mesh.enter(header)`; valid until the step ends."""

    header: StepHeader
    exchange_s: float  # seconds spent moving rows and waiting for them in this step
    expert_s: float  # seconds this rank spent computing expert rows in this step

    def moe(self, layer_id: int, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Expert half of one layer for this rank's tokens: plan, dispatch, (own experts), combine, weighted sum.

        x [num_tokens, hidden]; topk_ids [num_tokens, top_k] int32 logical; topk_weights float32. Returns [num_tokens,
        hidden] of x's dtype. num_tokens may be anything up to header.num_tokens[own rank], zero included.
        Raises ExchangeError (retryable: enter the next header and run the same batch again)."""
        ...

    def serve(self) -> None:
        """A rank without tokens in this step: take every MoE layer's turn with zero rows."""
        ...


class Mesh(Protocol):
    """This process's membership of the cluster. Headers arrive through the callback given to `start`."""

    @property
    def rank(self) -> int:
        """Own communicator rank in the epoch in force."""
        ...

    def bid(self, num_decode_tokens: int, num_prefill_tokens: int) -> None:
        """Ask for a step with at most so many tokens; (0, 0) withdraws. The leader answers with a header whose
        num_tokens[rank] is between 1 and the sum (all of decode, as much prefill as the cluster's budget allows).
        Thread-safe, never blocks, replaces the last bid. A bid is spent by the header that answers it."""
        ...

    def enter(self, header: StepHeader) -> StepContext:
        """Begin the named step, switching to its epoch and placement first if they are new. Engine thread only."""
        ...
