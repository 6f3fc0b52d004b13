"""Choose the tile of the grouped GEMM from what the host knows: how many pairs to expect, not where they go. Pure.

The choice changes speed only: every plan accumulates each output in the same order. Few rows per expert: the time is the
weights' stream, so a narrow tile leaves the ring to weights. Many rows: the time is arithmetic, so the tile is as wide as one
wgmma, and weights and rows are each read from L2 as rarely as registers allow. The figures behind the limits are in
docs/performance-kernels.md."""

from dataclasses import dataclass

from .pack import WeightForm

SHARED_BYTES_LIMIT = 227 << 10  # sm_90


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmPlan:
    warpgroups: int  # consumer warpgroups; a tile is 64 outputs for each
    tile: int  # most rows of one expert in a tile
    stages: int  # slots of the ring
    form: WeightForm

    @property
    def stage_bytes(self) -> int:
        return self.warpgroups * 8192 + self.tile * 128 + (self.tile * 8 if self.form == "fp8" else 0)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the ring and the slack to align it."""
        return self.stages * self.stage_bytes + 1024

    def defines(self, hidden_size: int, intermediate_size: int) -> dict[str, int]:
        return {
            "HIDDEN": hidden_size,
            "INTERMEDIATE": intermediate_size,
            "WARPGROUPS": self.warpgroups,
            "TILE": self.tile,
            "STAGES": self.stages,
            "FP8": int(self.form == "fp8"),
        }


PLANS: dict[WeightForm, tuple[tuple[float, GemmPlan], ...]] = {  # (most expected rows per expert, plan), ascending
    "bf16": (
        (24, GemmPlan(warpgroups=2, tile=64, stages=9, form="bf16")),
        (72, GemmPlan(warpgroups=2, tile=128, stages=6, form="bf16")),
        (float("inf"), GemmPlan(warpgroups=2, tile=256, stages=4, form="bf16")),
    ),
    "fp8": (
        (24, GemmPlan(warpgroups=2, tile=64, stages=8, form="fp8")),
        (float("inf"), GemmPlan(warpgroups=2, tile=128, stages=6, form="fp8")),
    ),
}
FEW_PAIRS = GemmPlan(
    warpgroups=1, tile=16, stages=20, form="bf16"
)  # one token: tiles of 64 outputs reach more multiprocessors


def choose_plan(form: WeightForm, expected_pairs: float, num_local_experts: int) -> GemmPlan:
    """The plan for about `expected_pairs` (row, expert) pairs over `num_local_experts` experts."""
    if form == "bf16" and expected_pairs <= 16:
        return FEW_PAIRS
    rows_per_expert = expected_pairs / num_local_experts
    return next(plan for limit, plan in PLANS[form] if rows_per_expert <= limit)
