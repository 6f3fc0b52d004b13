"""Build and end a whole cluster: Redis, Ray, the Conductor, and the three Serve applications.

Serve places, starts, restarts and drains the processes; it carries no token, so its proxies are off and each gateway
replica runs its own gRPC server. Start-up has one bound: it ends READY, or with a StartupError that carries the cause
which a replica reported (a broken checkpoint, a taken port), never with a bare time-out where a cause is known."""

import contextlib
import io
import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
import torch
from ray import serve
from ray.serve.api import RunTarget, run_many
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from ..config import ClusterConfig
from ..errors import ConfigError, StartupError, Unavailable
from ..experts.worker import ExpertShard
from ..model_source import describe_model, model_name, pinned
from ..redis_server import EmbeddedRedis, resolve_url
from ..router.gateway.deployment import Gateway
from ..router.gateway.redis_connection import check_store
from ..router.status import ClusterState
from .conductor_client import ConductorClient, start_conductor
from .gpus import check_gpus, missing_gpus, process_environment, with_device
from .member_agent import MemberAgent
from .per_node import OnePerNode, nodes_for
from .replica import AttentionReplica
from .tier_policy import AttentionTierPolicy, TierPolicy

OBJECT_STORE_BYTES = 80 << 20  # nothing of ours travels through Ray's object store
REPLICA_NUM_CPUS = 0.01  # Serve replicas share the cores; Ray's count must not stop a laptop from starting them
POLL_S = 0.2
MOST_SHARDS = 256  # Serve wants a bound
AUTOSCALING_PUSH_S = 1.0  # how often a replica's busy fraction reaches the policy
GRACE_S = 60.0  # to drain; then Serve kills
MAX_NODES = 1000  # with a gateway each
APPLICATIONS = ("experts", "attention", "gateway")  # in the order of the route, from its end

Progress = Callable[[str], None]


class Cluster:
    """A cluster that this process started. `start` returns when it serves, `stop` ends all of it, `with` does both."""

    def __init__(
        self,
        config: ClusterConfig,
        *,
        ray_address: str = "",
        progress: Progress | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        """`ray_address` names a running Ray ("auto", host:port); empty = a local one made for this cluster.
        `interrupted` is asked while waiting: true ends the start with KeyboardInterrupt."""
        if not config.model:
            raise ConfigError("model", "", "a folder in Hugging Face layout, the URL of one, or a hub id")
        self.config = config
        self.gateways: tuple[str, ...] = ()
        self.conductor: ConductorClient | None = None
        self._ray_address = ray_address
        self._progress = progress or (lambda _line: None)
        self._interrupted = interrupted
        self._redis: EmbeddedRedis | None = None
        self._owns_ray = False
        self._num_experts = 0
        self._started_at = time.monotonic()

    def start(self) -> None:
        self._started_at = time.monotonic()
        try:
            self._check_checkpoint()
            check_store(resolve_url(self.config.redis_url, os.environ))
            self._decide_device()
            self._start_ray()
            self._decide_device()
            self._complete_config()
            self._start_serve()
            self._start_conductor()
            self._deploy()
            self.gateways = self._wait_ready()
        except BaseException:
            self.stop()
            raise
        self._say(f"ready: gRPC on {', '.join(self.gateways)}")

    def state(self) -> ClusterState:
        assert self.conductor is not None, "the cluster is not started"
        return self.conductor.state_now()

    def upgrade(self) -> None:
        """Replace every process, tier by tier, by one that imports the code that its host has now.

        Gateways first (streams end or are resumed at another), then attention replicas (each drains: its requests end,
        or go on elsewhere with their tokens), then shards (each leaves by an epoch without it). Within a tier one after
        the other; a tier of one process is away while its successor starts, and requests wait."""
        assert self.conductor is not None, "the cluster is not started"
        made = applications(self.config, self.conductor, self._num_experts)
        for name in reversed(APPLICATIONS):
            if name in made:
                self._say(f"upgrade: {name}")
                run_many([RunTarget(made[name], name, None)], wait_for_ingress_deployment_creation=False)
                self._started_at = time.monotonic()
                self.gateways = self._wait_ready()

    def stop(self) -> None:
        """End every process of the cluster. Safe after a failed start and when called twice."""
        if self.conductor is not None:
            with contextlib.suppress(Unavailable):
                self.conductor.close()
            self._delete_applications()
            self.conductor.kill()
            self.conductor = None
        if self._owns_ray:
            stop_ray(with_serve=not self._ray_address)
            self._owns_ray = False
        if self._redis is not None:
            self._redis.stop()
            self._redis = None

    def __enter__(self) -> "Cluster":
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    # ---- phases of the start

    def _check_checkpoint(self) -> None:
        """Fail at once on what config.json alone can tell; tensors and shapes are the replicas' to check."""
        name = self.config.served_model_name or model_name(self.config.model)
        model = pinned(self.config.model, self.config.weights)  # all hosts serve the same commit
        self.config = replace(self.config, model=model, served_model_name=name)
        self._num_experts = describe_model(model, self.config.weights).num_experts
        if self._num_experts and self.config.num_expert_ranks > self._num_experts:
            limit = f"at most {self._num_experts}, the number of experts"
            raise ConfigError("num_expert_shards", self.config.num_expert_ranks, limit)

    def _complete_config(self) -> None:
        network = self.config.network
        if not network.cluster_token:
            network = replace(network, cluster_token=secrets.token_urlsafe(32))
        url = resolve_url(self.config.redis_url, os.environ)
        if not url:
            here = self.config.on_node(ray.util.get_node_ip_address()).network.interface
            self._redis = EmbeddedRedis(host=here if self._ray_address else "")
            url = self._redis.url
        self.config = replace(self.config, network=network, redis_url=url)

    def _start_ray(self) -> None:
        if not ray.is_initialized():
            self._say("starting Ray")
            start_ray(self._ray_address)
            self._owns_ray = True

    def _decide_device(self) -> None:
        """`auto` becomes cuda or cpu, and a start that lacks GPUs ends: before Ray, where it will be this host's own.
        To a Ray that runs hosts may come later: it is only said."""
        if ray.is_initialized():
            num_gpus = int(ray.cluster_resources().get("GPU", 0))
        elif not self._ray_address:
            num_gpus = torch.cuda.device_count()
        else:
            return
        self.config = with_device(self.config, self._num_experts, num_gpus)
        if not self._ray_address:
            check_gpus(self.config, self._num_experts, num_gpus)
        elif missing := missing_gpus(self.config, self._num_experts, num_gpus):
            self._say(f"waiting for hosts: {missing}")

    def _start_conductor(self) -> None:
        name = f"conductor-{secrets.token_hex(4)}"
        start_conductor(name, self.config)
        self.conductor = ConductorClient(name)

    def _start_serve(self) -> None:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
        if set(APPLICATIONS) & set(serve.status().applications):
            raise StartupError("a cluster runs in this Ray already: stop it, or name another Ray with --ray-address")

    def _deploy(self) -> None:
        self._say(f"starting {describe(self.config, self._num_experts)} on {self.config.device}")
        assert self.conductor is not None
        made = applications(self.config, self.conductor, self._num_experts)
        targets = [RunTarget(application, name, None) for name, application in made.items()]
        run_many(targets, wait_for_applications_running=False, wait_for_ingress_deployment_creation=False)

    def _wait_ready(self) -> tuple[str, ...]:
        """Poll the Conductor until all are in and an epoch is committed; a reported failure ends the wait at once."""
        deadline = self._started_at + self.config.startup_timeout_s
        summary = ""
        while True:
            state = self._state_or_none()
            if state is not None and state.failures:
                raise StartupError(f"the cluster did not start: {state.failures[0]}")
            if state is not None and state.ready:
                return state.gateways
            if state is not None and state.summary != summary:
                summary = state.summary
                self._say(summary)
            if self._interrupted():
                raise KeyboardInterrupt
            if time.monotonic() > deadline:
                raise StartupError(
                    f"the cluster was not ready after {self.config.startup_timeout_s:.0f} s: "
                    f"{summary or 'the conductor is not up'}; raise startup_timeout_s or read the logs under "
                    f"{_log_folder()}"
                )
            self._raise_if_serve_gave_up()
            time.sleep(POLL_S)

    def _state_or_none(self) -> ClusterState | None:
        try:
            return self.state()
        except Unavailable:
            return None  # still starting, or starting again

    def _raise_if_serve_gave_up(self) -> None:
        for name, application in serve.status().applications.items():
            if name in APPLICATIONS and application.status.value == "DEPLOY_FAILED":
                reasons = [d.message for d in application.deployments.values() if d.message] or [application.message]
                raise StartupError(f"{name} did not start: {reasons[0].strip().splitlines()[-1]}")

    def _delete_applications(self) -> None:
        if not ray.is_initialized():
            return
        with contextlib.suppress(ray.exceptions.RayError, RuntimeError):
            running = [name for name in reversed(APPLICATIONS) if name in serve.status().applications]
            for name in running:  # the gateway first, so that its streams end before what they wait for
                serve.delete(name, _blocking=False)
            for name in running:
                serve.delete(name)

    def _say(self, line: str) -> None:
        self._progress(f"[{time.monotonic() - self._started_at:5.1f} s] {line}")


def describe(config: ClusterConfig, num_experts: int) -> str:
    """`1 gateway, 2 attention replicas, 4 expert shards`, in the words of the layout."""

    def counted(n: int, noun: str) -> str:
        return f"{n} {noun}{'s' if n != 1 else ''}"

    gateways = counted(config.num_gateways, "gateway")
    if config.layout == "colocated":
        return f"{gateways}, {counted(config.num_attention_replicas, 'colocated rank')}"
    attention = counted(config.num_attention_replicas, "attention replica")
    shards = f", {counted(config.num_expert_shards, 'expert shard')}" if num_experts else ""
    return f"{gateways}, {attention}{shards}"


def start_ray(address: str = "") -> None:
    """A light local Ray, or a connection to a running one.

    Ray puts the driver's current folder on its workers' path and starts them in it. From a checkout, our `proto` would
    then shadow a published package of that name: so the call is made from the root folder, which holds no modules (a
    folder that is removed later would break torch's MKL in the workers, since it looks up its libraries from there)."""
    if not address:
        # A local Ray listens on this machine for this user only; `ray up` clusters set token authentication themselves.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", str(AUTOSCALING_PUSH_S))
    local: dict[str, Any] = {
        "address": "local",  # of our own, whatever other Ray runs on this host
        "num_cpus": max(2, os.cpu_count() or 2),
        "num_gpus": torch.cuda.device_count(),
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
    }
    where = {"address": address} if address else local
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with contextlib.chdir("/"):
        try:
            ray.init(namespace="expertmesh", log_to_driver=False, logging_level=logging.ERROR, **where)
        except Exception as error:  # Ray raises no type of its own
            if "timed out during startup" not in str(error):
                raise
            waiting, cores = os.getloadavg()[0], os.cpu_count()
            told = f"Ray was not up within its 30 s (load average {waiting:.0f} on {cores} cores)"
            raise StartupError(f"{told}: start again when this host has time") from error


def stop_ray(*, with_serve: bool = True) -> None:
    """End what `start_ray` made; a Ray that others use keeps its Serve. Ray reports the end of its own controller as an
    error on stdout: not shown."""
    with contextlib.redirect_stdout(io.StringIO()):
        if with_serve and ray.is_initialized():
            serve.shutdown()
        ray.shutdown()


def applications(config: ClusterConfig, conductor: ConductorClient, num_experts: int) -> dict[str, serve.Application]:
    """One Serve application a tier, so that each is upgraded and scaled alone. A dense model has no expert tier."""
    common: dict[str, Any] = {
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": GRACE_S,
        "health_check_period_s": 2.0,  # death is noticed on the data plane; this is how soon a replacement starts
        "health_check_timeout_s": 30.0,  # a busy replica must not be killed
        "max_constructor_retry_count": 3,
    }
    text = config.to_json()
    made: dict[str, serve.Application] = {}
    if config.layout == "disaggregated" and num_experts:
        shards = serve.deployment(
            ray_actor_options=actor_options(config, "expert"), **_number_of_shards(config, conductor), **common
        )
        made["experts"] = shards(ExpertShard).bind(text, conductor, MemberAgent)
    replicas = serve.deployment(
        ray_actor_options=actor_options(config, "attention"), **_number_of_replicas(config, conductor), **common
    )
    made["attention"] = replicas(AttentionReplica).bind(text, conductor, MemberAgent)
    gateways = serve.deployment(
        ray_actor_options=actor_options(config, "gateway"), **_number_of_gateways(config), **common
    )
    made["gateway"] = gateways(Gateway).bind(text, conductor)
    return made


def actor_options(config: ClusterConfig, role: str) -> dict[str, Any]:
    """What one replica asks Ray for; `role` is attention, expert or gateway. Ray shows a process the GPU that it took
    and no other, so that it is `cuda:0` to all of them."""
    on_gpu = config.device == "cuda" and role != "gateway"
    options: dict[str, Any] = {"num_cpus": REPLICA_NUM_CPUS, "num_gpus": int(on_gpu)}
    if on_gpu:
        options["runtime_env"] = {"env_vars": process_environment(os.environ)}
    if config.role_resources:
        options["resources"] = {role: 1}
    return options


def _number_of_gateways(config: ClusterConfig) -> dict[str, Any]:
    """Fixed, or one on each node that can hold one, as nodes come and go."""
    if not config.gateway_per_node:
        return {"num_replicas": config.num_gateways}
    resource = "gateway" if config.role_resources else ""
    autoscaling = AutoscalingConfig(
        min_replicas=1,
        initial_replicas=max(config.num_gateways, nodes_for(resource)),
        max_replicas=MAX_NODES,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        policy=AutoscalingPolicy(
            policy_function=OnePerNode, policy_kwargs={"resource": resource, "least": config.num_gateways}
        ),
    )
    return {"autoscaling_config": autoscaling, "max_replicas_per_node": 1}


def _number_of_shards(config: ClusterConfig, conductor: ConductorClient) -> dict[str, Any]:
    """Serve's to change by `TierPolicy`: within bounds, or fixed until an operator asks for another. Serve picks
    the victim of a scale-down; its `__del__` drains."""
    scaling = config.autoscaling
    policy: dict[str, Any] = {"conductor": conductor.name, "num_shards": config.num_expert_shards}
    if scaling.max_expert_shards:
        policy |= {
            "num_shards": 0,
            "min_shards": scaling.min_expert_shards,
            "max_shards": scaling.max_expert_shards,
            "target_busy": scaling.target_busy,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "cooldown_s": scaling.cooldown_s,
        }
    push_s = AUTOSCALING_PUSH_S if scaling.max_expert_shards else 10 * AUTOSCALING_PUSH_S
    autoscaling = AutoscalingConfig(
        min_replicas=1,  # the policy has its own bounds, which an operator may change
        initial_replicas=config.num_expert_shards,
        max_replicas=max(MOST_SHARDS, scaling.max_expert_shards, config.num_expert_shards),
        upscale_delay_s=0.0,  # the policy has its own; Serve's would be added and would forget what was said once
        downscale_delay_s=0.0,
        metrics_interval_s=push_s,
        look_back_period_s=2 * push_s,
        policy=AutoscalingPolicy(policy_function=TierPolicy, policy_kwargs=policy),
    )
    return {"autoscaling_config": autoscaling}


def _number_of_replicas(config: ClusterConfig, conductor: ConductorClient) -> dict[str, Any]:
    """Of the attention tier: fixed, or by KV use and queue. A victim's requests end, or go on elsewhere with their
    tokens. In the colocated layout they own the experts too: fixed."""
    scaling = config.autoscaling
    if not scaling.max_attention_replicas or config.layout == "colocated":
        return {"num_replicas": config.num_attention_replicas}
    policy: dict[str, Any] = {
        "conductor": conductor.name,
        "min_shards": scaling.min_attention_replicas,
        "max_shards": scaling.max_attention_replicas,
        "target_busy": scaling.target_pressure,
        "upscale_delay_s": scaling.upscale_delay_s,
        "downscale_delay_s": scaling.downscale_delay_s,
        "cooldown_s": scaling.cooldown_s,
    }
    autoscaling = AutoscalingConfig(
        min_replicas=1,
        initial_replicas=config.num_attention_replicas,
        max_replicas=max(scaling.max_attention_replicas, config.num_attention_replicas),
        upscale_delay_s=0.0,  # the policy's own count, as above
        downscale_delay_s=0.0,
        metrics_interval_s=AUTOSCALING_PUSH_S,
        look_back_period_s=2 * AUTOSCALING_PUSH_S,
        policy=AutoscalingPolicy(policy_function=AttentionTierPolicy, policy_kwargs=policy),
    )
    return {"autoscaling_config": autoscaling}


def _log_folder() -> str:
    node = ray._private.worker._global_node
    return f"{node.get_session_dir_path()}/logs/serve" if node is not None else "Ray's session folder on its head node"
