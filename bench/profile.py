"""Where the microseconds of a decode step go: kernels by group, beside the floor of each group, and the gaps between.

torch's profiler (CUPTI) watches whole runs, and a step begins with the embedding's kernel, also where it is one CUDA
graph. All runs are in one session, begun before the first: to begin takes longer than a run of one sequence, and a
second session of a process, or one that saw nothing, may leave CUPTI deaf. A spinning kernel before each run tells them
apart. Watched steps are slower than others (each kernel's times are written down, and kernels that would overlap may
begin later): compare shares, not sums. The floor of a group is the bytes that it must move, once, at the measured rate
of reading. Launches a layer bound batch 1: each kernel costs some 2 us of latency however little it does.

    python -m expertmesh.bench.profile --case 30b --batches 1,32,128"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from ..cluster.sizing import Form, Gpu, distinct_experts, expert_bytes, layer_bytes
from ..model_config import ModelConfig

MARKER = "embed_rms_norm"  # once a step, first of its kernels
SEPARATOR = "spin_kernel"  # `torch.cuda._sleep`, once before each run
GROUPS = (  # the first pattern that is found in a kernel's name
    ("experts", r"^grouped_gemm"),
    ("attention", r"Prefill|merge_chunks|[Ff]lash|fmha|[Dd]ecode"),
    ("route, pack, combine", r"^(gate_topk|route|pack|route_and_pack(_pairs)?|combine|combine_add_rms_norm)\b"),
    ("exchange", r"^(begin|dispatch|answer)\b|nccl"),
    ("norm, rope", r"^(add_rms_norm|embed_rms_norm|qk_norm_rope|silu_mul)\b"),
    ("sampling", r"^sample_"),
    ("dense", r"^(dense|quantize|dequantize)_|linear|gemm|nvjet|cutlass|xmma|gemv|splitK|cublas"),
    ("copies", r"[Mm]em(cpy|set)"),
)


class ProfileError(Exception):
    """There is nothing to take apart."""


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
        raise ProfileError(f"{len(begins)} steps among {len(runs)} kernels: at least two must begin")
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
        "dense": layer_bytes(config, form) + 2 * config.vocab_size * hidden,
        # rows in, pairs out; pairs in, residual in and out, norm out
        "route, pack, combine": moe * (2 * config.top_k + 4) * row,
        "norm, rope": layers * (4 * row + 2 * qkv),
        "sampling": 2 * batch * config.vocab_size,
    }
    for name, num_bytes in moved.items():
        profile.groups[name].floor_us = 1e6 * num_bytes / gpu.read_bytes_per_s


def watch(runs: Sequence[Callable[[], None]]) -> list[list[KernelRun]]:
    """The kernels of each of `runs`, which must have run before: nothing is compiled or captured now."""
    activity = torch.profiler.ProfilerActivity
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profiler:  # CPU: of this thread, idle
        for run in runs:
            torch.cuda._sleep(10_000)
            torch.cuda.synchronize()
            run()
            torch.cuda.synchronize()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    found = [
        KernelRun(event.name(), event.start_ns() / 1e3, event.duration_ns() / 1e3)
        for event in results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]
    return split_runs(found, len(runs))


def split_runs(kernels: Sequence[KernelRun], num_runs: int) -> list[list[KernelRun]]:
    """What lies between the separators."""
    parts: list[list[KernelRun]] = []
    for kernel in sorted(kernels, key=lambda kernel: kernel.start_us):
        if SEPARATOR in kernel.name:
            parts.append([])
        elif parts:
            parts[-1].append(kernel)
    if len(parts) != num_runs or not all(parts):
        raise ProfileError(
            f"the profiler saw {len(kernels)} kernels and copies in {len(parts)} of {num_runs} runs: another tool "
            "(compute-sanitizer, nsys, DCGM) may hold CUPTI, or the driver may keep its counters to administrators "
            "(NVreg_RestrictProfilingToAdminUsers); run `python -m expertmesh.bench.profile` alone in a process that "
            "may use it"
        )
    return parts


def last_steps(kernels: Sequence[KernelRun], num_steps: int) -> list[KernelRun]:
    """Those of the run's last whole steps, without its very last ones, after which sequences have ended."""
    ordered = sorted(kernels, key=lambda kernel: kernel.start_us)
    begins = [i for i, kernel in enumerate(ordered) if kernel.name.startswith(MARKER)]
    if len(begins) < num_steps + 3:
        raise ProfileError(
            f"{len(begins)} steps among {len(ordered)} kernels, of which {num_steps} should be taken apart; let "
            "--output be longer"
        )
    return ordered[begins[-num_steps - 3] : begins[-3] + 1]


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
        profiles = bench.profile(arguments.batches)
    for profile in profiles:
        print("\n".join(table(profile)), flush=True)
    print(json.dumps({"case": arguments.case, "device": bench.device_name, "profiles": [asdict(p) for p in profiles]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
