"""Fixtures that several files share: a tiny random checkpoint, and one Ray for the whole test session."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 layers, 64 experts, top-8, with the Qwen3 tokenizer; 20 MB of seeded noise."""
    from expertmesh.make_checkpoint import make_checkpoint

    folder = tmp_path_factory.mktemp("tiny-moe")
    make_checkpoint(folder, "tiny-moe", seed=1)
    return folder


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
