"""Where the microseconds of a decode step go: kernels by group, beside the floor of each group, and the gaps between.

torch's profiler (CUPTI) watches a running engine's device for some whole steps; a step begins with the embedding's
kernel, also where it is one CUDA graph. The floor of a group is the bytes that it must move, once, at the measured rate
of reading. Launches a layer bound batch 1: each kernel costs some 2 us of latency however little it does.

    python -m expertmesh.bench.profile --case 30b --batches 1,32,128"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from ..cluster.sizing import Form, Gpu, distinct_experts, expert_bytes, layer_parameters
from ..model_config import ModelConfig
from .local_engine import LocalEngine

MARKER = "embed_rms_norm"  # once a step, first of its kernels
GROUPS = (  # the first pattern that is found in a kernel's name
    ("experts", r"^grouped_gemm"),
    ("attention", r"Prefill|merge_chunks|[Ff]lash|fmha|Decode"),
    ("route, pack, combine", r"^(gate_topk|route|pack|route_and_pack|combine|combine_add_rms_norm)\b"),
    ("exchange", r"^(begin|dispatch|answer)\b|nccl"),
    ("norm, rope", r"^(add_rms_norm|embed_rms_norm|qk_norm_rope|silu_mul)\b"),
    ("sampling", r"^sample_"),
    ("dense", r"linear|gemm|nvjet|cutlass|xmma|gemv|splitK|cublas"),
    ("copies", r"[Mm]em(cpy|set)"),
)


@dataclass(frozen=True, slots=True)
class KernelRun:
    name: str
    start_us: float
    duration_us: float


@dataclass(slots=True, kw_only=True)
class Group:
    """Of one step, on average."""

    us: float = 0.0
    launches: float = 0.0
    floor_us: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    batch: int
    num_steps: int
    wall_us: float  # from the beginning of a step to that of the next
    busy_us: float  # at least one kernel runs
    launches: float
    launches_per_layer: float
    groups: dict[str, Group]
    unknown: dict[str, float]  # kernels of no group: us a step

    @property
    def gap_share(self) -> float:
        return 1 - self.busy_us / self.wall_us if self.wall_us else 0.0


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS if re.search(pattern, name)), "other")


def summarise(runs: Sequence[KernelRun], *, batch: int, num_layers: int) -> StepProfile:
    """Whole steps among `runs`: from the first marker to the last one."""
    ordered = sorted(runs, key=lambda run: run.start_us)
    begins = [run.start_us for run in ordered if run.name.startswith(MARKER)]
    if len(begins) < 2:
        raise ValueError(f"{len(begins)} steps among {len(runs)} kernels: at least two must begin")
    first, last, num_steps = begins[0], begins[-1], len(begins) - 1
    inside = [run for run in ordered if first <= run.start_us < last]
    groups: dict[str, Group] = {name: Group() for name, _ in GROUPS}
    unknown: dict[str, float] = {}
    busy, until = 0.0, first
    for run in inside:
        group = group_of(run.name)
        made = groups.setdefault(group, Group())
        made.us += run.duration_us / num_steps
        made.launches += 1 / num_steps
        if group == "other":
            unknown[run.name[:80]] = unknown.get(run.name[:80], 0.0) + run.duration_us / num_steps
        end = min(run.start_us + run.duration_us, last)
        busy += max(0.0, end - max(run.start_us, until))
        until = max(until, end)
    kernels = sum(1 for run in inside if group_of(run.name) != "copies")
    return StepProfile(
        batch=batch,
        num_steps=num_steps,
        wall_us=(last - first) / num_steps,
        busy_us=busy / num_steps,
        launches=kernels / num_steps,
        launches_per_layer=kernels / num_steps / num_layers,
        groups=groups,
        unknown=unknown,
    )


def set_floors(
    profile: StepProfile, config: ModelConfig, gpu: Gpu, *, form: Form, context: int, distinct: float | None = None
) -> None:
    """Bytes of each group over the rate of reading."""
    batch, layers, moe, hidden = profile.batch, config.num_layers, len(config.moe_layer_ids), config.hidden_size
    if distinct is None:
        distinct = distinct_experts(config, batch)
    row, qkv = 2 * batch * hidden, 2 * batch * (config.q_size + 2 * config.kv_size)
    moved = {
        "experts": moe * distinct * expert_bytes(config, form),
        "attention": batch * context * config.kv_bytes_per_token(2),
        "dense": 2 * (layer_parameters(config) + config.vocab_size * hidden),
        # rows in, pairs out; pairs in, residual in and out, norm out
        "route, pack, combine": moe * (2 * config.top_k + 4) * row,
        "norm, rope": layers * (4 * row + 2 * qkv),
        "sampling": 2 * batch * config.vocab_size,
    }
    for name, num_bytes in moved.items():
        profile.groups[name].floor_us = 1e6 * num_bytes / gpu.read_bytes_per_s


def watch_steps(engine: LocalEngine, *, batch: int, num_steps: int, num_layers: int) -> StepProfile:
    """Of an engine that decodes `batch` sequences now and for more than `num_steps` steps to come."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        begun = engine.num_steps
        deadline = time.monotonic() + 20
        while engine.num_steps < begun + num_steps and time.monotonic() < deadline:
            time.sleep(0.001)
        torch.cuda.synchronize()
    runs = [
        KernelRun(event.name(), event.start_ns() / 1e3, event.duration_ns() / 1e3)
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]
    return summarise(runs, batch=batch, num_layers=num_layers)


def table(profile: StepProfile) -> list[str]:
    head = f"batch {profile.batch}: {profile.wall_us:,.0f} us a step, {100 * profile.gap_share:.1f} % of it gaps, "
    lines = [head + f"{profile.launches:.0f} launches ({profile.launches_per_layer:.1f} a layer)"]
    lines.append(f"  {'group':<22} {'us':>9} {'floor':>9} {'x':>6} {'launches':>9}")
    for name, group in profile.groups.items():
        if group.launches:
            times = f"{group.us / group.floor_us:6.2f}" if group.floor_us else "      "
            lines.append(f"  {name:<22} {group.us:9.1f} {group.floor_us:9.1f} {times} {group.launches:9.1f}")
    lines.append(f"  {'gaps':<22} {profile.wall_us - profile.busy_us:9.1f}")
    top = sorted(profile.unknown.items(), key=lambda item: -item[1])[:5]
    lines += [f"    other: {name} {us:.1f} us" for name, us in top]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    from . import step  # which profiles too, beside its timings

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    step.add_arguments(parser)
    arguments = parser.parse_args(argv)
    with step.opened(arguments) as bench:
        profiles = [bench.profile(batch) for batch in arguments.batches]
    for profile in profiles:
        print("\n".join(table(profile)), flush=True)
    print(json.dumps({"case": arguments.case, "device": bench.device_name, "profiles": [asdict(p) for p in profiles]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
