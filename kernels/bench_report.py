"""What a run of the bench says: a line per cell, tables for the docs, and where it falls short of the goals. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

BEHIND_A_PEER = 1.03  # a cell slower than the best whole-layer peer by more than this falls short
INT4_FEW_TOKENS = 64
_LIKE_128 = {512: 128}  # the goal at 512 tokens is that at 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One form of one shard at one number of tokens; times in microseconds."""

    model: str
    form: str
    num_local: int
    routing: str
    num_tokens: int
    num_pairs: float
    floor_us: float
    us: float  # whole layer: ids and rows in, combined rows out
    gbps: float  # of weights touched
    tflops: float
    errors: dict[str, tuple[float, float]]  # against what -> (relative error, its bound)
    gemms_us: float | None = None  # both products and SwiGLU alone
    layer_peers: dict[str, float] = field(default_factory=dict)
    gemm_peers: dict[str, float] = field(default_factory=dict)
    operations: dict[str, tuple[float, float | None]] = field(default_factory=dict)  # here, in torch
    note: str = ""  # a plan that was asked for, stage times

    @property
    def ratio(self) -> float:
        return self.us / self.floor_us

    @property
    def best_layer_peer(self) -> tuple[str, float] | None:
        return min(self.layer_peers.items(), key=lambda p: p[1], default=None)

    @property
    def best_gemm_peer(self) -> tuple[str, float] | None:
        return min(self.gemm_peers.items(), key=lambda p: p[1], default=None)

    @property
    def title(self) -> str:
        routing = "" if self.routing == "uniform" else f" {self.routing}"
        return f"{self.model} {self.form} {self.num_local} local{routing} T {self.num_tokens}"


def _goals(t1: float, t8: float, t32: float, t128: float, t2048: float, t8192: float) -> dict[int, float]:
    return {1: t1, 8: t8, 32: t32, 128: t128, 2048: t2048, 8192: t8192}


# x floor, whole layer, Qwen3-235B-A22B, uniform routing: (GPU, form, local experts) -> tokens -> goal
GOALS: dict[tuple[str, str, int], dict[int, float]] = {
    ("H100", "bf16", 16): _goals(1.6, 1.15, 1.10, 1.10, 1.20, 1.30),
    ("H100", "bf16", 128): _goals(1.10, 1.04, 1.03, 1.06, 1.25, 1.27),
    ("H100", "fp8", 16): _goals(2.2, 1.35, 1.20, 1.15, 1.50, 1.45),
    ("H100", "fp8", 128): _goals(1.35, 1.12, 1.08, 1.10, 1.40, 1.45),
    ("H200", "fp8", 64): {32: 1.15, 128: 1.15},
}


def goal_of(cell: Cell, device: str) -> float | None:
    """The most x floor that this cell should take, or None where nothing was promised."""
    if cell.routing != "uniform":
        return None
    if cell.form == "int4":
        return 1.4 if cell.num_tokens <= INT4_FEW_TOKENS else None
    if cell.model != "235b":
        return None
    for (gpu, form, num_local), goals in GOALS.items():
        if gpu in device and (form, num_local) == (cell.form, cell.num_local):
            return goals.get(_LIKE_128.get(cell.num_tokens, cell.num_tokens))
    return None


def broken_musts(cells: Iterable[Cell]) -> list[str]:
    """What no run may show: an error above its bound, a cell clearly behind a peer of the same run."""
    found = []
    for cell in cells:
        for against, (error, bound) in cell.errors.items():
            if not error <= bound:  # NaN too
                found.append(f"{cell.title}: error {error:.1e} against {against}, bound {bound:.0e}")
        peer = cell.best_layer_peer
        if peer and cell.us > BEHIND_A_PEER * peer[1]:
            found.append(f"{cell.title}: {cell.us:.1f} us, {peer[0]} takes {peer[1]:.1f}")
    return found


def missed_goals(cells: Sequence[Cell], device: str) -> list[str]:
    found = []
    fp8_us = {(c.model, c.num_local, c.routing, c.num_tokens): c.us for c in cells if c.form == "fp8"}
    for cell in cells:
        goal = goal_of(cell, device)
        if goal and round(cell.ratio, 2) > goal:
            found.append(f"{cell.title}: {cell.ratio:.2f} x floor, goal {goal:.2f}")
        same = fp8_us.get((cell.model, cell.num_local, cell.routing, cell.num_tokens))
        if cell.form == "int4" and same and cell.num_tokens <= INT4_FEW_TOKENS and cell.us >= same:
            found.append(f"{cell.title}: {cell.us:.1f} us, fp8 takes {same:.1f}")
    return found


def cell_line(cell: Cell) -> str:
    parts = [
        f"{cell.title}: {cell.us:.1f} us = {cell.ratio:.2f} x floor {cell.floor_us:.1f}, {cell.gbps:.0f} GB/s, "
        f"{cell.tflops:.0f} TFLOP/s, error {_errors(cell)}",
        f"whole-layer peers: {_peers(cell.layer_peers, cell.us)}",
    ]
    if cell.gemms_us is not None or cell.gemm_peers:
        own = "-" if cell.gemms_us is None else f"{cell.gemms_us:.1f}"
        parts.append(f"products {own}, peers: {_peers(cell.gemm_peers, cell.gemms_us)}")
    if cell.note:
        parts.append(cell.note)
    lines = [" | ".join(parts)]
    if cell.operations:
        shown = [f"{n} {us:.1f} ({_torch(other)})" for n, (us, other) in cell.operations.items()]
        lines.append("    alone, us (torch): " + ", ".join(shown))
    return "\n".join(lines)


def _errors(cell: Cell) -> str:
    if len(cell.errors) == 1:
        return f"{next(iter(cell.errors.values()))[0]:.1e}"
    return ", ".join(f"{error:.1e} ({against})" for against, (error, _) in cell.errors.items())


def _torch(us: float | None) -> str:
    return "no peer" if us is None else f"{us:.1f}"


def _peers(peers: dict[str, float], own: float | None) -> str:
    if not peers:
        return "no peer"
    shown = [
        f"{name} {us:.1f}" + (f" ({us / own:.2f} x ours)" if own else "") for name, us in sorted(peers.items(), key=_us)
    ]
    return ", ".join(shown)


def _us(item: tuple[str, float]) -> float:
    return item[1]


def markdown(cells: Sequence[Cell], device: str) -> str:
    """One table per model and routing: tokens across; our time (x floor), the best peers and the goal down."""
    out: list[str] = []
    for model, routing in dict.fromkeys((c.model, c.routing) for c in cells):
        chosen = [c for c in cells if (c.model, c.routing) == (model, routing)]
        sizes = sorted({c.num_tokens for c in chosen})
        out += [f"**{model}, {routing} routing, {device}**: us (x floor)", ""]
        out.append(
            "| form, local experts | " + " | ".join(f"T = {n}" if n == sizes[0] else str(n) for n in sizes) + " |"
        )
        out.append("|---|" + "---|" * len(sizes))
        for form, num_local in dict.fromkeys((c.form, c.num_local) for c in chosen):
            row = {c.num_tokens: c for c in chosen if (c.form, c.num_local) == (form, num_local)}
            out += _rows(f"{form}, {num_local}", row, sizes, device)
        out.append("")
    return "\n".join(out)


def _rows(title: str, row: dict[int, Cell], sizes: Sequence[int], device: str) -> list[str]:
    def line(name: str, values: Sequence[str]) -> list[str]:
        return [f"| {name} | " + " | ".join(values) + " |"] if any(values) else []

    cells = [row.get(n) for n in sizes]
    layer = [c.best_layer_peer if c else None for c in cells]
    gemm = [c.best_gemm_peer if c else None for c in cells]
    goals = [goal_of(c, device) if c else None for c in cells]
    return (
        line(f"**{title}**", [f"**{_short(c.us)}** ({c.ratio:.2f})" if c else "-" for c in cells])
        + _peer_line("best whole-layer peer", layer)
        + line("goal", [f"{g:.2f}" if g else "" for g in goals])
        + line("products alone", [_short(c.gemms_us) if c and c.gemms_us else "" for c in cells])
        + _peer_line("best products-only peer", gemm)
    )


def _peer_line(name: str, peers: Sequence[tuple[str, float] | None]) -> list[str]:
    return [f"| {name} | " + " | ".join(f"{_short(p[1])} {p[0]}" if p else "no peer" for p in peers) + " |"]


def _short(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"
