"""Which ring each test file belongs to, and the seconds of each ring: the last lines of `make test`.

A file that is in no list counts as the rest. Seconds are those of set-up, test and teardown; a fixture of the whole
session counts where it is first used. The budgets are for 2 cores without other work."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ring:
    name: str
    most_s: float
    stems: frozenset[str]


def _files(names: str) -> frozenset[str]:
    return frozenset(f"test_{name}" for name in names.split())


RINGS: Sequence[Ring] = (
    Ring(
        "spine",
        240.0,
        _files(
            "balancer chat checkpoint cli client cluster cluster_service commands conductor config control dispatch "
            "engine engine_model events exchange experts_mlp gate generation kv_cache layers limits link memory mesh "
            "model_config model_parity numerics placement redis_server request_spans rpc_errors sampler scheduler "
            "server telemetry tls tokenizer trace"
        ),
    ),
    Ring("demo model", 60.0, _files("demo_model demo_served")),
    Ring(
        "kernels",
        60.0,
        _files(
            "attention_kernels_cpu decode_attention_emulated dense_fp8 dense_fp8_emulated kernels_bench kernels_cpu "
            "kernels_int4 kernels_launch nccl_pack permute_emulated quantized"
        ),
    ),
    Ring(
        "conversations",
        180.0,
        _files(
            "api_keys backlog conversation demo_conversations fair_queue fuzz gateway_kills grammar json_schema readme "
            "redis_faults redis_topologies resume session session_turns slow_readers structured_output thinking_state "
            "tool_calls waiting_room"
        ),
    ),
    Ring(
        "elastic",
        240.0,
        _files(
            "autoscale beside_steps chaos copies declared deploy deploy_bundle deploy_host deploy_kuberay "
            "deploy_ray_up elastic elastic_figures eplb failover guard member_agent membership membership_world "
            "model_source per_node rebalance scrub stray_workers"
        ),
    ),
)
REST, REST_S = "rest", 120.0


class RingSeconds:
    """Adds up what pytest reports."""

    def __init__(self) -> None:
        self._by_ring: dict[str, float] = defaultdict(float)
        self._ring_of: Mapping[str, str] = {stem: ring.name for ring in RINGS for stem in ring.stems}

    def add(self, stem: str, seconds: float) -> None:
        self._by_ring[self._ring_of.get(stem, REST)] += seconds

    def lines(self) -> list[str]:
        """One for each ring that ran; those above their budget say so."""
        limits = {ring.name: ring.most_s for ring in RINGS} | {REST: REST_S}
        return [
            f"{name}: {seconds:.0f} s of at most {most_s:.0f} s{', TOO LONG' if seconds > most_s else ''}"
            for name, most_s in limits.items()
            if (seconds := self._by_ring.get(name)) is not None
        ]
