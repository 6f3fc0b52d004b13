"""What a model needs of GPUs, and the floor of its speed there, from shapes alone. Pure: no torch, no device.

Bytes: a process holds weights, a reserve (CUDA context, workspaces, graphs, activations of one step), and KV in the
rest. An attention process holds everything but the experts as 16-bit numbers, an fp8 checkpoint's projections as they
are; an expert process holds places for its share of every layer's experts in the form of the kernels, some spare ones
more (a rebalance loads into them).

Floor: a step reads each byte that it needs once, and multiplies no faster than the GPU was measured to: T tokens of one
layer touch E * (1 - (1 - k / E)^T) experts where routing is even. Launches, padding, imbalance and waiting are not in
it; neither is the exchange, whose bytes are given beside it. Tiers that take turns add up; ranks that work side by side
share. Idea: the roofline model; figures of GPUs as measured, not as sold (docs/performance.md)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..config import Layout
from ..errors import ConfigError
from ..model_config import ModelConfig

Form = Literal["bf16", "fp8", "int4"]
GIB = 1 << 30
NUM_SPARE = 2  # places of a layer beyond a rank's slots, as `experts/device_experts.py` has them
USABLE = 0.99  # of a GPU's nominal memory: what the driver leaves
CONTEXT_BYTES = 3 * GIB  # CUDA context, kernels, cuBLAS and exchange buffers, CUDA graphs, the allocator's rest
WIDE_TOKENS = 65536  # of fp8 KV that are bf16 at once for long queries, unless one sequence may be longer
SHORT_CONTEXT = 192  # tokens a sequence, at which floors are compared: prompt 128 + half of an output of 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind, by what was measured on it."""

    name: str
    memory_bytes: int
    read_bytes_per_s: float
    bf16_flops: float
    fp8_flops: float  # in 128x128 blocks
    link_bytes_per_s: float = 384e9  # one way between two GPUs of a host

    @property
    def usable_bytes(self) -> int:
        return int(USABLE * self.memory_bytes)


GPUS = {
    "H100": Gpu(name="H100", memory_bytes=80 * GIB, read_bytes_per_s=3120e9, bf16_flops=712e12, fp8_flops=1248e12),
    "H200": Gpu(name="H200", memory_bytes=141 * GIB, read_bytes_per_s=4670e9, bf16_flops=691e12, fp8_flops=1275e12),
}


def parse_gpu(text: str) -> Gpu:
    """ "H100", "H100:80" (GiB), or a kind that was not measured here: "NAME:GIB:READ_GB_PER_S:BF16_TFLOPS"."""
    name, *figures = text.split(":")
    expected = f"{' or '.join(GPUS)} with its GiB (H100:80), or NAME:GIB:READ_GB_PER_S:BF16_TFLOPS"
    try:
        numbers = [float(figure) for figure in figures]
    except ValueError:
        raise ConfigError("--gpu", text, expected) from None
    known = GPUS.get(name.upper())
    if any(n <= 0 for n in numbers) or len(numbers) not in ((0, 1, 3) if known else (3,)):
        raise ConfigError("--gpu", text, expected)
    memory = int(numbers[0] * GIB) if numbers else 0
    if len(numbers) == 3:
        flops = numbers[2] * 1e12
        return Gpu(name=name, memory_bytes=memory, read_bytes_per_s=numbers[1] * 1e9, bf16_flops=flops, fp8_flops=flops)
    assert known is not None
    return Gpu(
        name=known.name,
        memory_bytes=memory or known.memory_bytes,
        read_bytes_per_s=known.read_bytes_per_s,
        bf16_flops=known.bf16_flops,
        fp8_flops=known.fp8_flops,
    )


def form_of(raw: Mapping[str, Any]) -> Form:
    """Of the experts of a checkpoint with this config.json."""
    method = (raw.get("quantization_config") or raw.get("compression_config") or {}).get("quant_method")
    return "bf16" if not method else "fp8" if method == "fp8" else "int4"


def has_zero_points(raw: Mapping[str, Any]) -> bool:
    """AWQ stores zero points of its own; GPTQ's symmetric form has none."""
    quantization = raw.get("quantization_config") or {}
    return quantization.get("quant_method") == "awq" or quantization.get("sym") is False


# --------------------------------------------------------------------------------------------------------------- bytes
def attention_parameters(config: ModelConfig) -> int:
    """Matrices of the attention tier: everything but the experts (norms are too small to count)."""
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return layer_parameters(config) + embeddings


def layer_parameters(config: ModelConfig) -> int:
    """Of all layers: projections, gates, dense MLPs."""
    return projection_parameters(config) + len(config.moe_layer_ids) * config.hidden_size * config.num_experts


def projection_parameters(config: ModelConfig) -> int:
    """What checkpoints quantise of the attention tier: all but the gates."""
    hidden, num_dense = config.hidden_size, config.num_layers - len(config.moe_layer_ids)
    attention = hidden * (2 * config.q_size + 2 * config.kv_size)
    return config.num_layers * attention + num_dense * 3 * hidden * config.intermediate_size


def layer_bytes(config: ModelConfig, form: Form) -> int:
    """Of all layers of the attention tier: fp8 stays fp8, int4 becomes bf16."""
    return 2 * layer_parameters(config) - (projection_parameters(config) if form == "fp8" else 0)


def expert_bytes(config: ModelConfig, form: Form, *, zero_points: bool = False) -> int:
    """One expert as the kernels hold it: fp8 with a float32 scale for 128x128 numbers, int4 with 16 bits (32 with a
    zero point) for 128."""
    n = config.expert_numel
    if form == "bf16":
        return 2 * n
    return n + 4 * n // 16384 if form == "fp8" else n // 2 + (4 if zero_points else 2) * n // 128


def activation_bytes(config: ModelConfig, num_tokens: int, num_seqs: int) -> int:
    """What a step of that size keeps at once, by its large tensors: expert rows in and out, a layer's rows, logits in
    16 and 32 bits (two steps of them: one may be in flight), and something for all else."""
    hidden = config.hidden_size
    experts = num_tokens * max(1, config.top_k) * 2 * (3 * hidden + 2 * config.moe_intermediate_size)
    dense = num_tokens * 2 * (3 * config.q_size + 2 * config.kv_size + 8 * hidden)
    if len(config.moe_layer_ids) < config.num_layers:
        dense += num_tokens * 2 * 3 * config.intermediate_size
    return experts + dense + 2 * num_seqs * config.vocab_size * (2 + 4) + (512 << 20)


def widened_kv_bytes(config: ModelConfig, longest: int) -> int:
    """fp8 KV: K and V of one layer in bf16, as `cluster/attention/flash.py` widens them for long queries."""
    return 2 * 2 * config.kv_size * max(longest, WIDE_TOKENS)


# --------------------------------------------------------------------------------------------------------------- plans
@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked of the GPUs."""

    context: int = 32768  # tokens of the longest sequence, prompt and answer
    num_batched_tokens: int = 2048  # of one step and replica
    num_seqs: int = 256
    kv_element_bytes: int = 2  # 1: cache.kv_dtype=fp8


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """One decode step of `batch` sequences in the whole cluster."""

    batch: int
    context: int
    distinct_experts: float  # of a layer
    bytes_read: int  # by the rank, or by one rank of each tier, that reads most
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One way to put a model on `num_gpus`; impossible where `problems` has any."""

    layout: Layout
    gpu: Gpu
    form: Form
    num_attention: int  # replicas; colocated: of the ranks, which own experts too
    num_shards: int  # ranks that own experts
    attention_weight_bytes: int  # of one replica
    expert_weight_bytes: int  # of one rank that owns experts, spare places included
    reserved_bytes: int  # of one attention process
    kv_bytes: int  # of one replica
    kv_tokens: int
    max_sequences: int  # of the longest context, in the whole cluster
    slots_per_rank: int  # experts of a layer
    num_redundant: int  # physical experts of a layer beyond the logical ones that have room, over all ranks
    dispatch_bytes_per_token: int  # over all layers, to other GPUs
    return_bytes_per_token: int
    floors: tuple[Floor, ...]
    prefill_tokens_per_s: float  # by arithmetic alone, the whole cluster
    problems: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.problems


def make_plan(
    config: ModelConfig,
    gpu: Gpu,
    *,
    layout: Layout,
    num_attention: int,
    num_shards: int,
    form: Form = "bf16",
    zero_points: bool = False,
    workload: Workload | None = None,
    batches: tuple[int, ...] = (1, 32, 128),
) -> Plan:
    """Colocated: `num_attention` == `num_shards` ranks with both roles. A model without experts has no shards."""
    workload = workload or Workload()
    colocated, num_experts = layout == "colocated", config.num_experts
    weights = 2 * (attention_parameters(config) - layer_parameters(config)) + layer_bytes(config, form)
    reserved = CONTEXT_BYTES + activation_bytes(config, workload.num_batched_tokens, workload.num_seqs)
    if workload.kv_element_bytes == 1:
        reserved += widened_kv_bytes(config, workload.context)
    layers = len(config.moe_layer_ids)
    per_slot = layers * expert_bytes(config, form, zero_points=zero_points)  # one slot of every layer
    least = -(-num_experts // num_shards) if num_shards else 0
    token_bytes = config.kv_bytes_per_token(workload.kv_element_bytes)
    context_bytes = workload.context * token_bytes
    problems = []

    beside = weights + reserved if colocated else CONTEXT_BYTES
    room = gpu.usable_bytes - beside - (context_bytes if colocated else 0)
    most = min(num_experts, room // per_slot - NUM_SPARE) if num_shards and per_slot else 0
    if most < least:
        problems.append(
            f"{least} of {num_experts} experts a layer (and {NUM_SPARE} spare places) need "
            f"{_gb((least + NUM_SPARE) * per_slot)} on each of {num_shards} GPUs, where {_gb(max(0, room))} of "
            f"{_gb(gpu.usable_bytes)} are free for them"
            + (f" beside {_gb(weights)} of attention weights and one context" if colocated else "")
        )
    experts = (least + NUM_SPARE) * per_slot if num_shards else 0
    kv = max(0, gpu.usable_bytes - weights - reserved - (experts if colocated else 0))
    kv_tokens = kv // token_bytes
    if kv_tokens < workload.context and not problems:
        problems.append(
            f"{_gb(kv)} of KV hold {kv_tokens:,} tokens beside {_gb(weights)} of attention weights"
            + (f" and {_gb(experts)} of experts" if colocated and experts else "")
            + f"; one sequence of {workload.context:,} needs {_gb(context_bytes)}"
        )
    dispatch, back = exchange_bytes_per_token(config, num_shards, colocated=colocated)
    return Plan(
        layout=layout,
        gpu=gpu,
        form=form,
        num_attention=num_attention,
        num_shards=num_shards,
        attention_weight_bytes=weights,
        expert_weight_bytes=experts,
        reserved_bytes=reserved,
        kv_bytes=kv,
        kv_tokens=kv_tokens,
        max_sequences=num_attention * (kv_tokens // workload.context),
        slots_per_rank=least,
        num_redundant=max(0, most * num_shards - num_experts),
        dispatch_bytes_per_token=dispatch,
        return_bytes_per_token=back,
        floors=tuple(
            step_floor(
                config,
                gpu,
                batch=batch,
                context=context,
                form=form,
                zero_points=zero_points,
                num_attention=num_attention,
                num_shards=num_shards,
                colocated=colocated,
                kv_element_bytes=workload.kv_element_bytes,
            )
            for context in (SHORT_CONTEXT, workload.context)
            for batch in batches
        ),
        prefill_tokens_per_s=prefill_rate(
            config, gpu, form=form, num_attention=num_attention, num_shards=num_shards, colocated=colocated
        ),
        problems=tuple(problems),
    )


def plans(
    config: ModelConfig,
    gpu: Gpu,
    num_gpus: int,
    *,
    layout: Layout | None = None,
    form: Form = "bf16",
    zero_points: bool = False,
    workload: Workload | None = None,
) -> list[Plan]:
    """Every split of `num_gpus` into the two tiers, and the colocated one; those that fit first, fastest first."""
    splits: list[tuple[Layout, int, int]] = []
    if not config.num_experts:
        splits.append(("colocated", num_gpus, 0))
    elif layout != "disaggregated":
        splits.append(("colocated", num_gpus, num_gpus))
    if config.num_experts and layout != "colocated":
        splits += [("disaggregated", a, num_gpus - a) for a in range(1, num_gpus)]
    if not splits:
        raise ConfigError("--layout", layout, "colocated on one GPU: two tiers take two")
    made = [
        make_plan(
            config,
            gpu,
            layout=layout_,
            num_attention=attention,
            num_shards=shards,
            form=form,
            zero_points=zero_points,
            workload=workload,
        )
        for layout_, attention, shards in splits
    ]
    return sorted(made, key=lambda plan: (not plan.fits, sum(f.ms for f in plan.floors if f.context == SHORT_CONTEXT)))


def what_would_fit(
    config: ModelConfig,
    gpu: Gpu,
    *,
    layout: Layout | None,
    form: Form,
    workload: Workload | None = None,
    most_gpus: int = 1024,
) -> list[str]:
    """Ways out for a model that does not fit: more GPUs of this kind, a smaller form, a larger GPU, less context."""

    def fewest(gpu: Gpu, form: Form) -> int | None:
        num = 1
        while num <= most_gpus:
            if (num > 1 or layout != "disaggregated") and plans(
                config, gpu, num, layout=layout, form=form, workload=workload
            )[0].fits:
                return num
            num += 1 if num < 16 else 8
        return None

    ways = []
    forms: tuple[Form, ...] = ("bf16", "fp8", "int4") if config.num_experts else ("bf16",)
    for kind in (gpu, *(other for other in GPUS.values() if other.memory_bytes > gpu.memory_bytes)):
        for one in forms[forms.index(form) :]:
            found = fewest(kind, one)
            if found is not None:
                ways.append(f"{found} x {kind.name} {kind.memory_bytes // GIB} GiB with {one} experts")
    return ways


# --------------------------------------------------------------------------------------------------------------- speed
def distinct_experts(config: ModelConfig, num_tokens: float) -> float:
    """Of a layer, where routing is even."""
    if not config.num_experts:
        return 0.0
    missed = math.pow(1 - config.top_k / config.num_experts, num_tokens)
    return config.num_experts * (1 - missed)


def step_floor(
    config: ModelConfig,
    gpu: Gpu,
    *,
    batch: int,
    context: int,
    form: Form = "bf16",
    zero_points: bool = False,
    num_attention: int = 1,
    num_shards: int = 1,
    colocated: bool = True,
    kv_element_bytes: int = 2,
    distinct: float | None = None,
) -> Floor:
    """`distinct` experts a layer as counted in a run, else as even routing has them."""
    own = -(-batch // num_attention)  # sequences of one replica
    head = 2 * config.vocab_size * config.hidden_size
    attention = layer_bytes(config, form) + head + own * context * config.kv_bytes_per_token(kv_element_bytes)
    flops = 2 * own * (layer_parameters(config) + config.vocab_size * config.hidden_size)
    attention_s = max(attention / gpu.read_bytes_per_s, flops / gpu.bf16_flops)
    distinct = distinct_experts(config, batch) if distinct is None else distinct
    layers, shards = len(config.moe_layer_ids), max(1, num_shards)
    experts = layers * distinct / shards * expert_bytes(config, form, zero_points=zero_points)
    expert_flops = 2 * batch * config.top_k * config.expert_numel * layers / shards
    experts_s = max(experts / gpu.read_bytes_per_s, expert_flops / _rate(gpu, form))
    return Floor(
        batch=batch,
        context=context,
        distinct_experts=distinct,
        bytes_read=int(attention + experts),
        ms=1e3 * (attention_s + experts_s),
    )


def prefill_rate(
    config: ModelConfig, gpu: Gpu, *, form: Form, num_attention: int, num_shards: int, colocated: bool
) -> float:
    """Tokens per second of the whole cluster by matrix arithmetic alone (attention over the context is not in it)."""
    dense_s = 2 * layer_parameters(config) / gpu.bf16_flops / num_attention
    expert_flops = 2 * config.top_k * config.expert_numel * len(config.moe_layer_ids)
    expert_s = expert_flops / _rate(gpu, form) / max(1, num_shards)
    # two tiers work side by side where there are several chunks; one rank does one thing after the other
    return 1 / (dense_s + expert_s if colocated else max(dense_s, expert_s))


def exchange_bytes_per_token(config: ModelConfig, num_shards: int, *, colocated: bool) -> tuple[int, int]:
    """(to experts, back) over all layers, 16 bits a number: a row for each other rank that owns one of the token's
    experts; back one row for each expert elsewhere."""
    if not num_shards or (colocated and num_shards == 1):
        return 0, 0
    experts, k = config.num_experts, config.top_k
    here = experts // num_shards
    none_of_them = math.comb(experts - here, k) / math.comb(experts, k)
    elsewhere = num_shards - 1 if colocated else num_shards
    row = 2 * config.hidden_size * len(config.moe_layer_ids)
    return int(elsewhere * (1 - none_of_them) * row), int(k * elsewhere / num_shards * row)


def _rate(gpu: Gpu, form: Form) -> float:
    return gpu.fp8_flops if form == "fp8" else gpu.bf16_flops


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
