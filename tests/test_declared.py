"""A cluster that Serve builds from import paths and arguments, as KubeRay's RayService does it."""

import contextlib
from pathlib import Path

import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from solo_engine import solo_tokens
from test_cluster import eventually, greedy, token_ids

from expertmesh.client import Client
from expertmesh.cluster.app import APPLICATIONS
from expertmesh.cluster.conductor_client import ConductorClient
from expertmesh.cluster.declared import CONDUCTOR
from expertmesh.errors import Unavailable
from expertmesh.redis_server import EmbeddedRedis
from expertmesh.router.status import ClusterState

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_runtime")]

PROMPT, NUM_TOKENS = [1, 2, 3], 24


def test_a_declared_cluster_says_what_one_process_says(tiny_checkpoint: Path):
    conductor = ConductorClient(CONDUCTOR)
    with EmbeddedRedis() as redis:
        arguments = {
            "model": str(tiny_checkpoint),
            "num_expert_shards": 1,
            "redis_url": redis.url,
            "cache": {"kv_memory_bytes": 16 << 20},
            "network": {"gateway_port": 0, "cluster_token": "secret"},
        }
        declared = [
            {
                "name": name,
                "import_path": f"expertmesh.cluster.declared:{name}",
                "route_prefix": None,
                "args": arguments,
            }
            for name in APPLICATIONS
        ]
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
        try:
            _get_global_client().deploy_apps(
                ServeDeploySchema.model_validate({"applications": declared}), _blocking=False
            )
            assert eventually(lambda: (state := state_or_none(conductor)) is not None and state.ready, 150.0)
            with Client(conductor.state_now().gateways, cluster_token="secret") as client:
                said = token_ids(greedy(client, PROMPT, NUM_TOKENS))
        finally:
            with contextlib.suppress(Unavailable):
                conductor.close()  # members need not wait for one another
            for name in reversed(APPLICATIONS):
                serve.delete(name, _blocking=False)
            for name in APPLICATIONS:
                serve.delete(name)
            conductor.kill()
    assert said == solo_tokens(tiny_checkpoint, [PROMPT], NUM_TOKENS)[0]


def state_or_none(conductor: ConductorClient) -> ClusterState | None:
    try:
        return conductor.state_now()
    except Unavailable:
        return None
