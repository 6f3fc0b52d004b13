"""The load windows that placements are compared on: generated ones (a frozen random stream), and the demo model's own.

Each scenario is a series of windows [num_layers, num_logical] as a cluster would see them one after the other, from an
even placement on. `experts/loads/demo_tasks.json` holds the rows that each expert of the demo model got in held-out
conversations of each task; a cluster whose users change from one task to another sees windows like these."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

LOADS = Path(__file__).resolve().parent.parent / "experts" / "loads"
ROWS = 200_000  # (token, expert) pairs of a layer in one generated window


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    name: str
    ep_size: int
    num_redundant: int
    windows: Callable[[], list[FloatArray]]
    ranks_per_host: int = 0  # 0 = one host

    @property
    def hosts(self) -> list[str]:
        return [f"host{rank // self.ranks_per_host if self.ranks_per_host else 0}" for rank in range(self.ep_size)]


def zipf(exponent: float, *, num_windows: int = 3, num_layers: int = 94, num_logical: int = 128) -> list[FloatArray]:
    """Experts in a random order of popularity a layer; every window one expert in ten changes its place in it."""
    rng = np.random.RandomState(12)
    popularity = np.arange(1, num_logical + 1) ** -exponent
    order = np.stack([rng.permutation(num_logical) for _ in range(num_layers)])
    windows = []
    for _ in range(num_windows):
        share = popularity[order] / popularity.sum()
        windows.append(np.stack([rng.multinomial(ROWS, row) for row in share]).astype(np.float64))
        for row in order:
            places = rng.choice(num_logical, num_logical // 10, replace=False)
            row[places] = row[np.roll(places, 1)]
    return windows


def topics(
    *, num_windows: int = 3, num_layers: int = 94, num_logical: int = 128, num_topics: int = 6
) -> list[FloatArray]:
    """Correlated layers: a topic has its own hot experts in each layer, and all layers follow the mix of topics."""
    rng = np.random.RandomState(34)
    affinity = rng.lognormal(0.0, 1.2, size=(num_topics, num_layers, num_logical))
    affinity /= affinity.sum(axis=2, keepdims=True)
    windows = []
    for _ in range(num_windows):
        share = np.tensordot(rng.dirichlet(np.full(num_topics, 0.5)), affinity, axes=1)
        windows.append(np.stack([rng.multinomial(ROWS, row / row.sum()) for row in share]).astype(np.float64))
    return windows


def demo(*tasks: str) -> list[FloatArray]:
    """Recorded windows of the demo model [6, 32], one for each task."""
    loads = json.loads((LOADS / "demo_tasks.json").read_text(encoding="utf-8"))["loads"]
    return [np.asarray(loads[task], dtype=np.float64) for task in tasks]


_TASKS = ("add", "series", "sort", "tool", "mixed")
SCENARIOS = (
    Scenario(name="zipf 1.2, 8 shards", ep_size=8, num_redundant=32, windows=partial(zipf, 1.2)),
    Scenario(name="zipf 1.2, 16 shards", ep_size=16, num_redundant=32, windows=partial(zipf, 1.2)),
    Scenario(
        name="zipf 1.2, 16 shards, 8 hosts", ep_size=16, num_redundant=32, windows=partial(zipf, 1.2), ranks_per_host=2
    ),
    Scenario(name="zipf 1.2, 16 shards, spares", ep_size=16, num_redundant=128, windows=partial(zipf, 1.2)),
    Scenario(name="uniform, 8 shards", ep_size=8, num_redundant=32, windows=partial(zipf, 0.0)),
    Scenario(name="topics, 16 shards", ep_size=16, num_redundant=32, windows=topics),
    Scenario(name="demo tasks, 4 shards", ep_size=4, num_redundant=8, windows=partial(demo, *_TASKS)),
    Scenario(name="demo tasks, 4 shards, spares", ep_size=4, num_redundant=32, windows=partial(demo, *_TASKS)),
)
