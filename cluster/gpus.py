"""Which processes take a GPU, whether Ray has so many, and the environment that they start with.

Why here: a replica that asks for a GPU which no host has waits in Ray without a word. So they are counted before
anything starts, and a local cluster that cannot fit is refused with the arithmetic. `device: auto` is decided here too,
once for all: Ray hides the GPUs from a process that asked for none, so a process cannot decide for itself. A Ray that
others started may get its hosts later: there nothing is refused, but the progress says what is missing.

The numbers are data in, data out; `app.py` asks Ray and torch for them."""

from collections.abc import Mapping
from dataclasses import replace

from ..config import ClusterConfig
from ..errors import ConfigError

# Read by torch when a process makes its first NCCL communicator. An exchange's errors are ours to handle (deadline,
# abort, next epoch): torch's watchdog would end the process, its monitor would wait for a dump that nobody reads.
NCCL_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}


def gpus_needed(config: ClusterConfig, num_experts: int) -> dict[str, int]:
    """Processes that take a GPU each, by role, as the cluster starts: one rank that owns both tiers is one GPU."""
    needed = {"attention": config.num_attention_replicas}
    if config.layout == "disaggregated" and num_experts:
        needed["expert"] = config.num_expert_shards
    return needed


def with_device(config: ClusterConfig, num_experts: int, num_gpus: int) -> ClusterConfig:
    """`config` with `device: auto` decided: cuda where every process that wants a GPU can have one, else the CPU."""
    if config.device != "auto":
        return config
    enough = 0 < sum(gpus_needed(config, num_experts).values()) <= num_gpus
    return replace(config, device="cuda" if enough else "cpu")


def missing_gpus(config: ClusterConfig, num_experts: int, num_gpus: int) -> str:
    """What is wrong with `num_gpus` GPUs, with the arithmetic; empty where they do."""
    needed = gpus_needed(config, num_experts)
    if config.device != "cuda" or sum(needed.values()) <= num_gpus:
        return ""
    attention = "colocated rank" if config.layout == "colocated" else "attention replica"
    noun = {"attention": attention, "expert": "expert shard"}
    parts = [f"{count} {noun[role]}{'s' if count != 1 else ''}" for role, count in needed.items()]
    return f"{sum(needed.values())} GPUs ({', '.join(parts)}, one each), {num_gpus} there"


def check_gpus(config: ClusterConfig, num_experts: int, num_gpus: int) -> None:
    """ConfigError where a Ray of this host alone could never place all processes."""
    if missing := missing_gpus(config, num_experts, num_gpus):
        remedy = "layout=colocated with num_attention_replicas=1 needs one GPU, device=cpu none"
        if not num_gpus:
            remedy = "no CUDA driver or device was found (nvidia-smi, CUDA_VISIBLE_DEVICES); device=cpu needs none"
        raise ConfigError("device", "cuda", f"{missing}; {remedy}")


def process_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables of a process with a GPU, set before it imports torch; what the operator set already stays."""
    return {name: environ.get(name, value) for name, value in NCCL_ENVIRONMENT.items()}
