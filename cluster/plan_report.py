"""A plan in lines for people (`expertmesh plan`): bytes, what fits, floors, all splits of the GPUs."""

from ..model_config import ModelConfig
from .sizing import GIB, SHORT_CONTEXT, Plan, Workload


def report(config: ModelConfig, found: list[Plan], ways: list[str], workload: Workload, *, name: str) -> list[str]:
    best = found[0]
    num_gpus = best.num_attention if best.layout == "colocated" else best.num_attention + best.num_shards
    experts = f", {best.form} experts" if config.num_experts else ""
    lines = [f"{name}{experts} on {num_gpus} x {best.gpu.name} {best.gpu.memory_bytes // GIB} GiB"]
    if not best.fits:
        lines += [f"  does not fit, {_split(p)}: {problem}" for p in found for problem in p.problems]
        return [*lines, *(f"  would fit: {way}" for way in ways)]
    lines += _processes(config, best, workload)
    lines += _speed(best, workload)
    others = found[1:]
    if others:
        lines += ["", "  all splits               KV tokens   redundant   ms per token at batch " + _batches(best)]
        lines += [_row(p) for p in found]
    if workload.context > config.max_position_embeddings:
        lines.append(f"  the model knows {config.max_position_embeddings:,} positions: more take YaRN (rope_scaling)")
    return lines


def _processes(config: ModelConfig, p: Plan, workload: Workload) -> list[str]:
    lines = [f"  {_split(p)}"]
    weights, reserve = _gb(p.attention_weight_bytes), _gb(p.reserved_bytes)
    kv = f"KV {_gb(p.kv_bytes)} = {p.kv_tokens:,} tokens" + (" in fp8" if workload.kv_element_bytes == 1 else "")
    if p.layout == "colocated":
        mine = f", experts {_gb(p.expert_weight_bytes)}" if p.num_shards else ""
        lines.append(f"  each rank: attention weights {weights}{mine}, reserve {reserve}, {kv}")
    else:
        lines.append(f"  each attention replica: weights {weights}, reserve {reserve}, {kv}")
        lines.append(f"  each expert shard: {_gb(p.expert_weight_bytes)}")
    if p.num_shards:
        more = f"room for {p.num_redundant} redundant ones a layer" if p.num_redundant else "no room for redundant ones"
        lines.append(f"  {p.slots_per_rank} of {config.num_experts} experts a layer on each; {more}")
    lines.append(f"  {p.max_sequences} sequences of {workload.context:,} tokens at once")
    return lines


def _speed(p: Plan, workload: Workload) -> list[str]:
    lines = ["", "  floor of a decode step, ms per token (what is read, once):"]
    for context in dict.fromkeys((SHORT_CONTEXT, workload.context)):
        cells = []
        for floor in (f for f in p.floors if f.context == context):
            holds = floor.batch * context <= p.num_attention * p.kv_tokens
            cells.append(f"batch {floor.batch}: {floor.ms:.2f}" if holds else f"batch {floor.batch}: too much KV")
        lines.append(f"    {context:,} tokens of context: " + ", ".join(cells))
    lines.append(f"  prefill, by arithmetic: at most {p.prefill_tokens_per_s:,.0f} tokens/s")
    if p.return_bytes_per_token:
        there, back = p.dispatch_bytes_per_token, p.return_bytes_per_token
        link_us = 1e6 * (there + back) / p.gpu.link_bytes_per_s
        sent = f"{there / 1e6:.2f} MB to experts, {back / 1e6:.2f} MB back"
        lines.append(f"  exchange a token: {sent} ({link_us:.1f} us of one link)")
    return lines


def _row(p: Plan) -> str:
    split = f"  {_split(p):<24}"
    if not p.fits:
        return f"{split} does not fit"
    short = "  ".join(f"{f.ms:6.2f}" for f in p.floors if f.context == SHORT_CONTEXT)
    return f"{split} {p.num_attention * p.kv_tokens:>10,}   {p.num_redundant:>9}   {short}"


def _split(p: Plan) -> str:
    if p.layout == "colocated":
        return f"{p.num_attention} colocated" if p.num_shards else f"{p.num_attention} replicas"
    return f"{p.num_attention} attention + {p.num_shards} experts"


def _batches(p: Plan) -> str:
    return " / ".join(str(f.batch) for f in p.floors if f.context == SHORT_CONTEXT)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
