"""The seam between the engine and the mesh: two small protocols, so that each is tested with a real small other
half."""

from typing import Protocol

import torch

from .epoch import StepHeader
from .placement import Placement


class LocalExperts(Protocol):
    """The physical experts of this process, given by `experts/mlp.py`; used by the mesh alone."""

    def set_placement(self, placement: Placement, ep_rank: int) -> None:
        """Make the placement's slots of this rank resident (load what is missing). Idempotent; called from a background
        thread while an older version serves, so it changes nothing that `forward` reads. A first placement is in use
        at once; a later one from `use_placement` on."""
        ...

    def use_placement(self, version: int) -> None:
        """From here on `forward`'s slot ids are those of this resident version; older ones may be dropped. Engine
        thread, between steps."""
        ...

    def forward(self, layer_id: int, rows: torch.Tensor, slot_ids: torch.Tensor) -> torch.Tensor:
        """rows [R, hidden], slot_ids [R, top_k] int32 (-1 none) -> [num_pairs, hidden]: one unweighted row per (row, k)
        with an id >= 0, in row-major (row, k) order, contiguous, rows' dtype. Reads `rows`, keeps no view of it.
        Ids on a GPU, where the host does not know the number of pairs: [R, top_k, hidden] instead, no host sync, and
        what stands at pairs of -1 means nothing."""
        ...


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

    def finish(self) -> None:
        """The device has done all of the step: raises what went wrong in it. Where `moe` and `serve` wait by
        themselves, as on a CPU, everything was said there."""
        ...


class Mesh(Protocol):
    """This process's membership of the cluster. Headers arrive through the callback given to `start`."""

    @property
    def rank(self) -> int:
        """Own communicator rank in the epoch in force."""
        ...

    def bid(self, num_decode_tokens: int, num_prefill_tokens: int, traceparent: str = "") -> None:
        """Ask for a step with at most so many tokens; (0, 0) withdraws. The leader answers with a header whose
        num_tokens[rank] is between 1 and the sum (all of decode, as much prefill as the cluster's budget allows).
        Thread-safe, never blocks, replaces the last bid. A bid is spent by the header that answers it. `traceparent` of
        one request in it lets the header carry a trace to the experts' owners."""
        ...

    def enter(self, header: StepHeader) -> StepContext:
        """Begin the named step, switching to its epoch and placement first if they are new. Engine thread only."""
        ...
