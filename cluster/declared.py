"""The three Serve applications for a declarative config: `serve deploy`, and KubeRay's RayService (deploy/kuberay/).

`app.Cluster` makes them from one process that stays; here Serve builds each from an import path and the same arguments,
ClusterConfig as a mapping. What that process would make up must then be said: `redis_url` and `network.cluster_token`,
in the arguments or as EXPERTMESH_* variables of the pods. The Conductor is made by whoever comes first."""

import os
from typing import Any

from ray import serve

from ..config import ClusterConfig, environment_overrides, from_mapping, override
from ..errors import ConfigError
from ..model_source import describe_model, model_name, pinned
from .app import applications
from .conductor_client import ConductorClient, start_conductor

CONDUCTOR = "conductor-declared"


def experts(arguments: dict[str, Any]) -> serve.Application:
    return _build("experts", arguments)


def attention(arguments: dict[str, Any]) -> serve.Application:
    return _build("attention", arguments)


def gateway(arguments: dict[str, Any]) -> serve.Application:
    return _build("gateway", arguments)


def config_of(arguments: dict[str, Any], environ: dict[str, str] | os._Environ[str]) -> ClusterConfig:
    """Arguments, then the environment. ConfigError where it is not enough for processes that nobody introduces."""
    config: ClusterConfig = override(from_mapping(ClusterConfig, arguments), environment_overrides(environ))
    if not config.model:
        raise ConfigError("model", "", "a path that every pod has, an https URL or a hub id")
    if not config.redis_url:
        raise ConfigError("redis_url", "", "a Redis that all gateways share")
    if not config.network.cluster_token:
        raise ConfigError("network.cluster_token", "", "a secret that all processes share")
    return config


def _build(name: str, arguments: dict[str, Any]) -> serve.Application:
    config = config_of(arguments, os.environ)
    num_experts = describe_model(config.model, config.weights).num_experts
    fields = {"model": pinned(config.model, config.weights)}
    fields["served_model_name"] = config.served_model_name or model_name(config.model)
    config = override(config, fields)
    start_conductor(CONDUCTOR, config)
    made = applications(config, ConductorClient(CONDUCTOR), num_experts)
    if name not in made:
        raise ConfigError("applications", name, f"one of {', '.join(made)}: this model has no expert tier")
    return made[name]
