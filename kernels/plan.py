"""Choose the tile of the grouped GEMM from what the host knows: how many pairs to expect, not where they go. Pure.

The choice changes speed only: every plan accumulates each output in the same order. Few rows per expert: the time is
the weights' stream, so a narrow tile leaves the ring to weights. Many rows: the time is arithmetic, so the tile is as
wide as one wgmma, and weights and rows are each read from L2 as rarely as registers allow. The figures behind the
limits are in docs/performance-kernels.md."""

from dataclasses import dataclass

from .pack import WeightForm

SHARED_BYTES_LIMIT = 227 << 10  # sm_90


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmPlan:
    m_rows: int  # outputs of a tile: 32, 64 or 128
    tile: int  # most rows of one expert in a tile
    stages: int  # slots of the ring
    cluster: int = 1  # CTAs that share the rows of a tile
    rows_wide: bool = False  # fp8: rows are the tensor cores' wide operand instead of the weights
    form: WeightForm

    @property
    def staged(self) -> bool:
        """Outputs leave through shared memory."""
        return self.tile >= 128

    @property
    def granule(self) -> int:
        """Rows that cost the same as one: a tile that others of the expert follow holds a multiple of them."""
        return self.tile if self.rows_wide else 8

    @property
    def num_threads(self) -> int:
        return 512 if self.rows_wide and self.tile == 192 else 384 if self.m_rows == 128 else 256

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the ring, the row scales, the chunks of output."""
        stage = self.m_rows * 128 + self.tile * 128 + (self.tile * 8 if self.form == "fp8" else 0)
        beyond = max(0, 64 - self.m_rows) * 128  # wgmma reads 64 rows whatever the tile holds
        return self.stages * stage + beyond + ((3 if self.num_threads == 512 else 2) * 64 * 272 if self.staged else 0)

    @property
    def static_shared_bytes(self) -> int:
        """Upper bound of what the kernel declares itself: barriers, the tile queue, fp8 peaks."""
        return 16 * self.stages + 320 + (9 * 4 * self.tile if self.form == "fp8" else 0)

    def fits(self, hidden_size: int, intermediate_size: int) -> bool:
        """Whether these sizes are whole numbers of (pairs of) tiles. Rows wide: also whether each product has more
        k-blocks than the ring has slots: a warpgroup that may be a tile ahead of another could take its slot of output.
        """
        if self.rows_wide and min(hidden_size, intermediate_size) // 128 <= self.stages:
            return False
        grain = self.m_rows * self.cluster
        return hidden_size % grain == 0 and 2 * intermediate_size % grain == 0

    def defines(self, hidden_size: int, intermediate_size: int) -> dict[str, int]:
        return {
            "HIDDEN": hidden_size,
            "INTERMEDIATE": intermediate_size,
            "M_ROWS": self.m_rows,
            "TILE": self.tile,
            "STAGES": self.stages,
            "CLUSTER": self.cluster,
            "FP8": int(self.form == "fp8"),
            "ROWS_WIDE": int(self.rows_wide),
        }


# For few pairs: most of w2's k-blocks of a tile fit the ring; bf16 also reaches more multiprocessors.
NARROW: dict[WeightForm, tuple[float, GemmPlan]] = {  # most expected pairs, plan
    "bf16": (16, GemmPlan(m_rows=64, tile=8, stages=24, form="bf16")),
    "fp8": (4, GemmPlan(m_rows=128, tile=8, stages=12, form="fp8")),
}
# (most expected rows per expert, plan), ascending
PLANS: dict[WeightForm, tuple[tuple[float, GemmPlan], ...]] = {
    "bf16": (
        (40, GemmPlan(m_rows=128, tile=64, stages=9, form="bf16")),
        (72, GemmPlan(m_rows=128, tile=128, stages=5, form="bf16")),
        (float("inf"), GemmPlan(m_rows=128, tile=256, stages=4, form="bf16")),
    ),
    "fp8": (
        (24, GemmPlan(m_rows=128, tile=64, stages=8, form="fp8")),
        (float("inf"), GemmPlan(m_rows=128, tile=192, stages=4, rows_wide=True, form="fp8")),
    ),
}


def all_plans(form: WeightForm) -> list[GemmPlan]:
    return [NARROW[form][1], *(plan for _, plan in PLANS[form])]


def choose_plan(
    form: WeightForm, expected_pairs: float, num_local_experts: int, hidden_size: int, intermediate_size: int
) -> GemmPlan:
    """The plan for about `expected_pairs` (row, expert) pairs over `num_local_experts` experts, or where it does not
    fit these sizes the next narrower one that does."""
    most, narrow = NARROW[form]
    if expected_pairs <= most:
        return narrow
    rows = expected_pairs / num_local_experts
    wanted = next(i for i, (limit, _) in enumerate(PLANS[form]) if rows <= limit)
    return next(plan for _, plan in PLANS[form][wanted::-1] if plan.fits(hidden_size, intermediate_size))
