"""deploy/kuberay/: the Serve config by Ray's schema; ports, probes, labels and resources by what the code asks for."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertmesh.cluster.app import actor_options
from expertmesh.cluster.declared import config_of
from expertmesh.config import NODE, ClusterConfig, from_mapping
from expertmesh.errors import ConfigError

FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "kuberay"
ENVIRONMENT = {"EXPERTMESH_REDIS_URL": "redis://redis", "EXPERTMESH_NETWORK__CLUSTER_TOKEN": "secret"}


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    loaded = yaml.safe_load((FOLDER / "rayservice.yaml").read_text())
    assert (loaded["apiVersion"], loaded["kind"]) == ("ray.io/v1", "RayService")
    found: dict[str, Any] = loaded["spec"]
    return found


@pytest.fixture(scope="module")
def applications(spec: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(spec["serveConfigV2"])["applications"]
    return found


def groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in spec["rayClusterConfig"]["workerGroupSpecs"]}


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def config(applications: list[dict[str, Any]]) -> ClusterConfig:
    return config_of(applications[0]["args"], ENVIRONMENT)


def test_serve_accepts_the_config_and_every_import_path_is_a_builder(
    spec: dict[str, Any], applications: list[dict[str, Any]]
):
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    assert schema.proxy_location.value == "Disabled"
    assert [a["name"] for a in applications] == ["experts", "attention", "gateway"]
    for application in applications:
        module, _, name = application["import_path"].partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        assert name == application["name"]
        assert application["args"] == applications[0]["args"], "the tiers would be of different clusters"


def test_arguments_and_pod_environment_make_a_whole_configuration(
    spec: dict[str, Any], applications: list[dict[str, Any]]
):
    whole = config(applications)
    assert (whole.network.interface, whole.network.gateway_host) == (NODE, NODE)
    assert whole.role_resources
    assert whole.gateway_per_node
    for missing in ENVIRONMENT:
        with pytest.raises(ConfigError, match=missing.removeprefix("EXPERTMESH_").lower().replace("__", ".")):
            config_of(applications[0]["args"], {k: v for k, v in ENVIRONMENT.items() if k != missing})
    heads = spec["rayClusterConfig"]["headGroupSpec"]
    for pod in (heads, *groups(spec).values()):
        assert set(ENVIRONMENT) <= {variable["name"] for variable in container(pod)["env"]}
    assert from_mapping(ClusterConfig, applications[0]["args"]).network.cluster_token == "", "a secret in the file"


def test_worker_groups_offer_what_replicas_ask_for(spec: dict[str, Any], applications: list[dict[str, Any]]):
    whole = config(applications)
    wanted = {
        "gateway": whole.num_gateways,
        "attention": whole.num_attention_replicas,
        "expert": whole.num_expert_shards,
    }
    most = {"gateway": 1, "attention": whole.num_attention_replicas, "expert": whole.autoscaling.max_expert_shards}
    for role, count in wanted.items():
        group = groups(spec)[role]
        offered = json.loads(group["rayStartParams"]["resources"].strip("'"))
        asked = actor_options(whole, role)
        assert set(offered) == set(asked["resources"]) == {role}
        assert offered[role] * group["minReplicas"] >= count, "the cluster would wait for pods that never come"
        assert offered[role] * group["maxReplicas"] >= most[role]
        gpus = container(group)["resources"]["limits"].get("nvidia.com/gpu", 0)
        assert gpus == int(group["rayStartParams"].get("num-gpus", 0)) == asked["num_gpus"] * offered[role]
        assert container(group)["resources"]["requests"].get("nvidia.com/gpu", 0) == gpus


def test_clients_reach_ready_gateways_and_nobody_else(spec: dict[str, Any], applications: list[dict[str, Any]]):
    service = yaml.safe_load((FOLDER / "service.yaml").read_text())
    (port,) = service["spec"]["ports"]
    gateway = groups(spec)["gateway"]
    (exposed,) = container(gateway)["ports"]
    own_port = config(applications).network.gateway_port
    assert exposed == {"containerPort": own_port, "name": port["targetPort"]}
    assert port["port"] == own_port
    assert container(gateway)["readinessProbe"]["grpc"] == {"port": own_port}
    selector = service["spec"]["selector"].items()
    chosen = [
        n for n, g in groups(spec).items() if selector <= g["template"].get("metadata", {}).get("labels", {}).items()
    ]
    assert chosen == ["gateway"]


def test_no_pod_waits_for_a_proxy_that_is_off_and_all_may_drain(spec: dict[str, Any]):
    from expertmesh.cluster.app import GRACE_S

    for name, group in groups(spec).items():
        probe = container(group)["readinessProbe"]
        assert "8000" not in json.dumps(probe), name
        assert ("grpc" in probe) == (name == "gateway")
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > GRACE_S
    assert spec["rayClusterConfig"]["authOptions"] == {"mode": "token"}
