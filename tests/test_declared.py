"""A cluster that Serve builds from import paths and arguments, as KubeRay's RayService does it: it says what a single
process says, grows when it is busy and shrinks when it is idle."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from elastic_streams import under_load
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from shared_cluster import serving
from solo_engine import PROMPTS
from test_cluster import all_idle, client_of, eventually, greedy, token_ids

from expertmesh.cluster.app import APPLICATIONS
from expertmesh.cluster.conductor_client import ConductorClient
from expertmesh.cluster.declared import CONDUCTOR, config_of
from expertmesh.errors import Unavailable
from expertmesh.redis_server import EmbeddedRedis
from expertmesh.router.status import ClusterState

pytestmark = pytest.mark.ray

NUM_TOKENS = 24
# One of each tier while idle, two when busy.
AUTOSCALING = {
    "max_expert_shards": 2,
    "target_busy": 0.02,
    "max_attention_replicas": 2,
    "target_pressure": 0.3,
    "upscale_delay_s": 0.5,
    "downscale_delay_s": 1.0,
    "cooldown_s": 1.0,
}


class DeclaredCluster:
    """The part of `app.Cluster` that tests look at, of a cluster that no process of ours started."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.config = config_of(arguments, {})
        self.conductor = ConductorClient(CONDUCTOR)

    def state(self) -> ClusterState:
        return self.conductor.state_now()

    @property
    def gateways(self) -> tuple[str, ...]:
        return self.state().gateways


@pytest.fixture(scope="module")
def declared(ray_runtime: None, tiny_checkpoint: Path) -> Iterator[DeclaredCluster]:
    with EmbeddedRedis() as redis:
        arguments = {
            "model": str(tiny_checkpoint),
            "num_expert_shards": 1,
            "redis_url": redis.url,
            "cache": {"kv_memory_bytes": 16 << 20},
            "network": {"gateway_port": 0, "cluster_token": "secret"},
            "scheduler": {"max_num_seqs": 4},
            "autoscaling": AUTOSCALING,
        }
        applications = [
            {
                "name": name,
                "import_path": f"expertmesh.cluster.declared:{name}",
                "route_prefix": None,
                "args": arguments,
            }
            for name in APPLICATIONS
        ]
        cluster = DeclaredCluster(arguments)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
        try:
            _get_global_client().deploy_apps(
                ServeDeploySchema.model_validate({"applications": applications}), _blocking=False
            )
            assert eventually(lambda: is_ready(cluster), 150.0)
            yield cluster
        finally:
            with contextlib.suppress(Unavailable):
                cluster.conductor.close()  # members need not wait for one another
            for name in reversed(APPLICATIONS):
                serve.delete(name, _blocking=False)
            for name in APPLICATIONS:
                serve.delete(name)
            cluster.conductor.kill()


def is_ready(cluster: DeclaredCluster) -> bool:
    try:
        return cluster.state().ready
    except Unavailable:
        return False


def test_a_declared_cluster_says_what_one_process_says(declared: DeclaredCluster, solo: list[list[int]]):
    with client_of(declared) as client:
        said = token_ids(greedy(client, PROMPTS[0], NUM_TOKENS))
    assert said == solo[0][:NUM_TOKENS]


def test_busy_tiers_grow_by_themselves_and_shrink_when_idle(declared: DeclaredCluster, solo: list[list[int]]):
    """Shards by their busy fraction, attention replicas by the places taken."""

    def sizes() -> tuple[int, int]:
        return len(serving(declared, "attention")), len(serving(declared, "expert"))

    with client_of(declared) as client, under_load(client, solo):
        assert eventually(lambda: sizes() == (2, 2), 60.0)
    assert eventually(lambda: sizes() == (1, 1), 60.0)
    assert eventually(lambda: all_idle(declared))
    grown, shrunk = [d.text for d in declared.state().decisions if "attention replicas" in d.text][:2]
    assert grown.endswith("target 0.30: 2 attention replicas")
    assert shrunk.endswith("target 0.30: 1 attention replicas are enough")
