"""Imports point one way: left never knows right, nothing imports deploy or tests, CuPy stays inside kernels."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A module may import from its own layer and from those before it.
LAYERS = [
    {
        "errors",
        "config",
        "request",
        "telemetry",
        "numerics",
        "checkpoint",
        "model_config",
        "make_checkpoint",
        "model_source",
        "startup_phases",
        "dummy_checkpoint",
        "parallel_reads",
        "quantized",
        "remote_file",
        "redis_server",
    },
    {"kernels", "proto"},
    {"router"},
    {"experts"},
    {"cluster"},
    {"client", "cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
RAY_FILES = {
    "cluster/app.py",
    "cluster/conductor.py",
    "cluster/conductor_client.py",
    "cluster/declared.py",
    "cluster/per_node.py",
    "cluster/replica.py",
    "cluster/stray_workers.py",
    "cluster/tier_policy.py",
    "experts/worker.py",
    "router/gateway/deployment.py",
}
REDIS_FILES = {"router/gateway/redis_connection.py", "redis_server.py"}


def package_files() -> list[Path]:
    files = [p for p in ROOT.glob("*.py") if p.stem != "__init__"]
    for layer in ("kernels", "proto", "router", "experts", "cluster"):
        files += (ROOT / layer).rglob("*.py")
    return sorted(p for p in files if "_pb2" not in p.name)


def imports_of(path: Path) -> set[str]:
    """Absolute dotted names that a file imports; names inside the package start with `expertmesh.`."""
    package = ["expertmesh", *path.relative_to(ROOT).with_suffix("").parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", package_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_left(path: Path):
    name = str(path.relative_to(ROOT))
    own = LEVEL[path.relative_to(ROOT).parts[0].removesuffix(".py")]
    for imported in imports_of(path):
        parts = imported.split(".")
        if parts[0] == "expertmesh" and len(parts) > 1:
            assert parts[1] not in ("deploy", "tests", "bench"), f"{name} imports {imported}"
            assert LEVEL.get(parts[1], 0) <= own, f"{name} imports {imported}, which lies to its right"
        if parts[0] in ("cupy", "cupyx"):
            assert name.startswith("kernels/"), f"{name} imports CuPy"
        if parts[0] == "ray":
            assert name in RAY_FILES, f"{name} imports Ray"
        if parts[0] == "redis":
            assert name in REDIS_FILES, f"{name} imports redis"


def test_the_front_door_starts_without_torch_or_cupy():
    code = (
        "import sys; sys.path.insert(0, '.link')\n"
        "import expertmesh, expertmesh.config, expertmesh.errors, expertmesh.telemetry\n"
        "heavy = {'torch', 'cupy', 'ray', 'grpc', 'opentelemetry'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_members_run_where_there_is_no_ray():
    """What GPU hosts are measured and tested with."""
    code = (
        "import sys; sys.path[:0] = ['.link', 'tests']; sys.modules['ray'] = None\n"
        "import expertmesh.bench.death_drill, expertmesh.bench.exchange_gpu, expertmesh.bench.step, mesh_worlds\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "module", ["router.gateway.deployment", "cluster.conductor_client", "cluster.tier_policy", "cluster.per_node"]
)
def test_gateways_and_serves_controller_start_without_torch(module: str):
    """It is two thirds of a process's start, and 150 MB."""
    code = (
        "import sys; sys.path.insert(0, '.link')\n"
        f"import expertmesh.{module}\n"
        "heavy = {'torch', 'cupy', 'transformers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
