"""Fixtures that several files share, the order in which files use one cluster in turn, the seconds of each ring."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rings import RingSeconds

if TYPE_CHECKING:
    from expertmesh.cluster.app import Cluster

SHARERS = ("test_cluster", "test_elastic")  # of `shared_cluster`, in this order and together

os.environ.setdefault("OMP_NUM_THREADS", "1")  # what batch-invariant mode stands on; before torch is imported
# Ray runs what it starts at nice 15; a cluster under test would stand still behind whatever else this host does.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 layers, 64 experts, top-8, with the Qwen3 tokenizer; 20 MB of seeded noise."""
    from expertmesh.make_checkpoint import make_checkpoint

    folder = tmp_path_factory.mktemp("tiny-moe")
    make_checkpoint(folder, "tiny-moe", seed=1)
    return folder


@pytest.fixture(scope="module")
def private_cubins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels are compiled here, whatever a cache of this host holds."""
    from expertmesh.kernels import jit

    before = jit._cache_directory
    jit.set_cache_directory(tmp_path_factory.mktemp("cubins"))
    yield
    jit.set_cache_directory(before)


@pytest.fixture(scope="session")
def solo(tiny_checkpoint: Path) -> list[list[int]]:
    """What a single process says to each of `solo_engine.PROMPTS`; whatever a cluster looks like, it says the same."""
    from solo_engine import NUM_TOKENS, PROMPTS, solo_tokens

    return solo_tokens(tiny_checkpoint, PROMPTS, NUM_TOKENS)


@pytest.fixture(scope="session")
def demo_engine() -> Iterator[str]:
    """The link's address of a process with the demo model's engine, a little slowed so that streams can be broken."""
    from expertmesh.bench.gateway_processes import EngineProcess

    engine = EngineProcess(step_s=0.003)
    yield engine.wait_ready()
    engine.kill()


@pytest.fixture(scope="session")
def ray_runtime() -> Iterator[None]:
    """A local Ray with Serve; clusters come and go inside it. A host that is too busy for Ray's own limit gets another
    try; what the first has left ends with this process."""
    from expertmesh.cluster.app import start_ray, stop_ray
    from expertmesh.errors import StartupError

    try:
        start_ray()
    except StartupError:
        start_ray()
    yield
    stop_ray()


@pytest.fixture
def shared(ray_runtime: None, tiny_checkpoint: Path) -> "Cluster":
    """The cluster of `shared_cluster.py`, whole."""
    from shared_cluster import shared_cluster

    return shared_cluster(tiny_checkpoint)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that share the cluster run next to each other, where the first of them stands."""
    sharing = [item for item in items if item.path.stem in SHARERS]
    if sharing:
        first = items.index(sharing[0])
        sharing.sort(key=lambda item: SHARERS.index(item.path.stem))
        others = [item for item in items if item.path.stem not in SHARERS]
        items[:] = others[:first] + sharing + others[first:]


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """A Ray runs one cluster at a time: after its last user the shared one ends."""
    if item.path.stem in SHARERS and (nextitem is None or nextitem.path.stem not in SHARERS):
        from shared_cluster import end_shared_cluster

        end_shared_cluster()


# ---------------------------------------------------------------- the seconds of each ring

_seconds = RingSeconds()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds.add(Path(report.fspath).stem, report.duration)


def pytest_terminal_summary(terminalreporter: "pytest.TerminalReporter") -> None:
    terminalreporter.section("seconds of each ring", sep="-")
    for line in _seconds.lines():
        terminalreporter.write_line(line)
