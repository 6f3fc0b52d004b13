"""The configuration of a cluster, read once at process start and handed down in the smallest piece that a class needs.

Sources, later wins: the defaults here, a YAML or JSON file (`expertmesh serve --config`), `EXPERTMESH_*` variables of
the environment, command-line flags. `model_config.py` holds what is read from the checkpoint."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import ConfigError

Layout = Literal["disaggregated", "colocated"]
NODE = "node"  # as an address: the one by which Ray knows the host that a process runs on


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Paged KV."""

    block_size: int = 16  # tokens a block; the batch-invariant attention tile is one block
    kv_dtype: Literal["auto", "bf16", "fp8"] = "auto"  # auto: the model's; fp8: e4m3, half of bf16's bytes
    num_blocks: int = 0  # 0 = sized from kv_memory_bytes (CPU) or from free memory (GPU)
    kv_memory_bytes: int = 256 << 20
    enable_prefix_cache: bool = True

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ConfigError("cache.block_size", self.block_size, "a power of two")
        if self.kv_dtype not in ("auto", "bf16", "fp8"):
            raise ConfigError("cache.kv_dtype", self.kv_dtype, "auto, bf16 or fp8")
        if self.num_blocks < 0:
            raise ConfigError("cache.num_blocks", self.num_blocks, "0 (automatic) or a positive count")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """One token budget per step, shared by decode and prefill."""

    max_num_batched_tokens: int = 2048  # tokens a step on one attention replica
    max_num_seqs: int = 256  # requests running at once on one attention replica
    max_num_waiting: int = 1024  # queue bound; beyond it QueueFull
    max_num_queued: int = 4096  # requests that wait at one gateway while the tier is full; beyond it QueueFull
    max_num_queued_per_key: int = 1024  # of one API key's owner
    max_prefill_tokens_per_step: int = (
        1024  # over all attention replicas: any prefill sets everybody's inter-token time
    )
    max_step_stretch: float = 2.5  # GPUs: a step with prompts, in steps of its decodes alone; its chunks are learned

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) < 1:
                raise ConfigError(f"scheduler.{f.name}", getattr(self, f.name), "a positive count")

    @property
    def graph_buckets(self) -> tuple[int, ...]:
        """Sizes of captured decode steps on a GPU, the same on all members: eighths of a power of two, and the most
        sequences that a replica runs."""
        most = min(self.max_num_seqs, self.max_num_batched_tokens)
        sizes = {max(1, eighths << power >> 3) for power in range(most.bit_length() + 1) for eighths in range(8, 16)}
        return tuple(sorted({size for size in sizes if size < most and (size % 4 == 0 or size < 3)} | {most}))


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """Where sockets bind and what they ask for. Every port 0 = chosen by the system. A cluster of several hosts says
    "node" for both addresses."""

    interface: str = "127.0.0.1"  # address of the one interface that data, link and control sockets bind
    gateway_host: str = "127.0.0.1"
    gateway_port: int = 50051
    metrics_port: int = -1  # Prometheus; -1 = off, 0 = chosen by the system
    api_keys_file: str = ""  # lines `OWNER SHA256_OF_KEY [WEIGHT]`; empty = clients need no key
    cluster_token: str = ""  # required by link and cluster RPCs; empty = a random one made by `serve`
    max_message_bytes: int = 64 << 20
    max_request_bytes: int = 16 << 20  # of one client request
    tls_cert_file: str = ""  # PEM chain of the gateways; empty = no TLS for clients
    tls_key_file: str = ""
    tls_client_ca_file: str = ""  # clients must then show a certificate signed by it (mTLS)

    def __post_init__(self) -> None:
        if self.max_request_bytes < 1:
            raise ConfigError("network.max_request_bytes", self.max_request_bytes, "a positive count")
        if not 0 <= self.gateway_port < 65536:
            raise ConfigError("network.gateway_port", self.gateway_port, "0..65535")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeConfig:
    """How rows move between ranks. A wait may last base + per_row * rows of the step."""

    # auto: gloo between CPUs, peer between GPUs of one host, nccl between others; the same on all members.
    backend: Literal["auto", "local", "gloo", "nccl", "peer"] = "auto"
    timeout_base_s: float = 10.0
    timeout_per_row_s: float = 0.01
    epoch_timeout_s: float = 60.0
    max_tokens_per_turn: int = 2048  # GPUs: of one source; a layer of a larger step is exchanged in parts
    nccl_exact_above: int = 256  # rows of a source above which counts may be read, see router/nccl_form.py
    # Of a communicator. 16: 310 MiB, and 4 MiB to another rank take 36 us; 4: 86 MiB, 126 us; 0, NCCL's own choice:
    # 640 MiB, 29 us.
    nccl_channels: int = 16

    def __post_init__(self) -> None:
        for name in ("max_tokens_per_turn", "nccl_exact_above"):
            if getattr(self, name) < 1:
                raise ConfigError(f"exchange.{name}", getattr(self, name), "a positive count")
        if self.timeout_base_s <= 0 or self.timeout_per_row_s < 0:
            raise ConfigError("exchange.timeout_base_s", self.timeout_base_s, "seconds above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubConfig:
    """Checks of expert weights at rest, in the background."""

    period_s: float = 60.0  # a whole round, where the share allows it; 0 = off
    max_share: float = 0.02  # of one core

    def __post_init__(self) -> None:
        if self.period_s < 0:
            raise ConfigError("scrub.period_s", self.period_s, "0 (off) or seconds")
        if not 0 < self.max_share <= 1:
            raise ConfigError("scrub.max_share", self.max_share, "above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryConfig:
    """Off by default. `otlp_endpoint` or `console` switches spans on; metrics_port (network) switches metrics on."""

    otlp_endpoint: str = ""
    console: bool = False
    sampling_ratio: float = 1.0

    @property
    def tracing(self) -> bool:
        return bool(self.otlp_endpoint) or self.console


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalingConfig:
    """Of the expert tier and of the attention tier; `num_expert_shards` and `num_attention_replicas` are where they
    start."""

    max_expert_shards: int = 0  # 0 = off: the number stays as configured
    min_expert_shards: int = 1
    target_busy: float = 0.6  # part of the time that a shard should compute rows
    upscale_delay_s: float = 2.0  # for so long the load must be too high
    downscale_delay_s: float = 30.0
    cooldown_s: float = 10.0  # between two changes
    max_attention_replicas: int = 0  # 0 = off: the number stays as configured
    min_attention_replicas: int = 1
    target_pressure: float = 0.7  # part of a replica's KV or places that should be taken (`attention_pressure`)

    def __post_init__(self) -> None:
        if self.max_attention_replicas and not 1 <= self.min_attention_replicas <= self.max_attention_replicas:
            expected = f"1 to max_attention_replicas ({self.max_attention_replicas})"
            raise ConfigError("autoscaling.min_attention_replicas", self.min_attention_replicas, expected)
        if not 0 < self.target_pressure < 1:
            raise ConfigError("autoscaling.target_pressure", self.target_pressure, "between 0 and 1")
        if self.max_expert_shards and not 1 <= self.min_expert_shards <= self.max_expert_shards:
            expected = f"1 to max_expert_shards ({self.max_expert_shards})"
            raise ConfigError("autoscaling.min_expert_shards", self.min_expert_shards, expected)
        if not 0 < self.target_busy < 1:
            raise ConfigError("autoscaling.target_busy", self.target_busy, "between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceConfig:
    """Placing experts anew by what they were asked for, while the cluster serves."""

    enabled: bool = True
    skew: float = 1.15  # hottest rank / mean, summed over layers, above which experts are placed anew
    min_gain: float = 1.03  # predicted expert time before / after; below it nothing is copied
    interval_s: float = 15.0  # between two placements: a new one must show first
    rows_per_expert: int = 50  # mean rows of an expert and layer that a window needs: fewer show chance, not load
    max_moves: int = -1  # expert copies of one rebalance, over all layers; -1 = as many as help

    def __post_init__(self) -> None:
        if self.skew < 1:
            raise ConfigError("rebalance.skew", self.skew, "1 or more; it is max / mean")
        if self.rows_per_expert < 1:
            raise ConfigError("rebalance.rows_per_expert", self.rows_per_expert, "a positive count")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    """How the files of a model that is named by URL or hub id come to each host (`model_source.py`), or none."""

    cache_dir: str = "~/.cache/expertmesh"  # on each host; its processes share it
    whole_files: bool = False  # fetch and verify whole files, not only the parts that hold a process's tensors
    num_connections: int = 4  # of one process
    timeout_s: float = 30.0  # without a byte
    max_attempts: int = 6  # in a row without a byte
    hub_endpoint: str = "https://huggingface.co"  # `serve` takes HF_ENDPOINT
    hub_token: str = ""  # `serve` takes HF_TOKEN
    load_format: Literal["auto", "dummy"] = "auto"  # dummy: only config.json is read, weights are seeded noise

    def __post_init__(self) -> None:
        for name in ("num_connections", "max_attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"weights.{name}", getattr(self, name), "a positive count")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """A whole cluster: what `expertmesh serve` starts."""

    model: str = ""  # in Hugging Face layout: a folder, the URL of one, or a hub id ORG/NAME[@REVISION]
    served_model_name: str = ""  # default: the folder's name
    layout: Layout = "disaggregated"
    num_gateways: int = 1
    gateway_per_node: bool = False  # one on each node, all at gateway_port; READY as soon as num_gateways serve
    role_resources: bool = False  # a replica takes one of the node's "attention", "expert" or "gateway" resource
    num_attention_replicas: int = 1
    num_expert_shards: int = 2  # ignored in the colocated layout, where every attention replica owns experts
    num_redundant_experts: int = 0  # extra physical experts a layer, spread over the shards
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on CPU, the checkpoint's on GPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_invariant: bool | None = None  # None: on for CPU, off for GPU
    max_model_len: int = 0  # 0 = the checkpoint's
    redis_url: str = ""  # empty = an embedded server
    session_ttl_s: float = 24 * 3600.0
    thinking_closing_text: str = ""  # forced when a thinking budget is spent; empty = Qwen3's early-stop sentence
    startup_timeout_s: float = 300.0
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    scrub: ScrubConfig = field(default_factory=ScrubConfig)
    autoscaling: AutoscalingConfig = field(default_factory=AutoscalingConfig)
    rebalance: RebalanceConfig = field(default_factory=RebalanceConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)

    def __post_init__(self) -> None:
        for name in ("num_gateways", "num_attention_replicas", "num_expert_shards"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "at least 1")
        if self.num_redundant_experts < 0:
            raise ConfigError("num_redundant_experts", self.num_redundant_experts, "0 or more")
        scaling = self.autoscaling
        if scaling.max_expert_shards and not (
            scaling.min_expert_shards <= self.num_expert_shards <= scaling.max_expert_shards
        ):
            expected = f"{scaling.min_expert_shards} to {scaling.max_expert_shards}, the bounds of autoscaling"
            raise ConfigError("num_expert_shards", self.num_expert_shards, expected)

    @property
    def num_expert_ranks(self) -> int:
        return self.num_attention_replicas if self.layout == "colocated" else self.num_expert_shards

    def on_node(self, address: str) -> "ClusterConfig":
        """As a process on the host with this address has it."""
        network = self.network
        interface = address if network.interface == NODE else network.interface
        gateway_host = address if network.gateway_host == NODE else network.gateway_host
        return replace(self, network=replace(network, interface=interface, gateway_host=gateway_host))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ClusterConfig":
        config: ClusterConfig = from_mapping(cls, json.loads(text))
        return config


_SECTIONS: dict[str, type] = {
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "network": NetworkConfig,
    "exchange": ExchangeConfig,
    "scrub": ScrubConfig,
    "autoscaling": AutoscalingConfig,
    "rebalance": RebalanceConfig,
    "telemetry": TelemetryConfig,
    "weights": WeightsConfig,
}


def from_mapping(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Build a config dataclass from nested mappings; an unknown name is a ConfigError, never ignored."""
    known = {f.name for f in fields(cls)}
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(prefix + name, value, f"one of {', '.join(sorted(known))}")
        section = _SECTIONS.get(name)
        if section:
            value = from_mapping(section, value, f"{prefix}{name}.")
        made[name] = _checked(prefix + name, value, get_type_hints(cls)[name])
    return cls(**made)


def _checked(path: str, value: Any, hint: Any) -> Any:
    """`value` if it is of the field's type; an int passes for a float."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(path, value, f"one of {', '.join(map(str, get_args(hint)))}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(path, value, f"a value of type {getattr(hint, '__name__', hint)}")
    return value


def override(config: ClusterConfig, assignments: Mapping[str, str]) -> ClusterConfig:
    """Apply dotted `section.field` -> text (from flags or the environment), converted to the field's present type."""
    for path, text in assignments.items():
        section, _, name = path.rpartition(".")
        target = getattr(config, section, None) if section else config
        if target is None or name not in {f.name for f in fields(target)}:
            raise ConfigError(path, text, "a field of ClusterConfig, for example scheduler.max_num_seqs")
        value = _convert(path, text, getattr(target, name))
        value = _checked(path, value, get_type_hints(type(target))[name])
        update: dict[str, Any] = {name: value}
        if section:
            update = {section: replace(target, **update)}
        config = replace(config, **update)
    return config


def environment_overrides(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """`EXPERTMESH_SCHEDULER__MAX_NUM_SEQS=8` -> {"scheduler.max_num_seqs": "8"}."""
    environ = os.environ if environ is None else environ
    prefix = "EXPERTMESH_"
    return {k[len(prefix) :].lower().replace("__", "."): v for k, v in environ.items() if k.startswith(prefix)}


def _convert(path: str, text: str, present: Any) -> Any:
    try:
        if isinstance(present, bool) or present is None:
            lowered = text.lower()
            if lowered in ("1", "true", "yes", "on"):
                return True
            if lowered in ("0", "false", "no", "off"):
                return False
            raise ValueError(text)
        return type(present)(text)
    except ValueError:
        raise ConfigError(path, text, f"a {type(present).__name__}") from None
