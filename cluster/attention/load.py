"""Which runner serves a model on a device, loaded: the GPU engine where its kernels run, plain torch elsewhere."""

import logging

import torch

from ...checkpoint import Checkpoint, ProgressCallback
from ...config import CacheConfig, SchedulerConfig
from ...errors import KernelError
from ...startup_phases import StartupPhases
from .runner import Runner, StepRunner

_log = logging.getLogger(__name__)


def load_runner(
    checkpoint: Checkpoint,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    max_model_len: int,
    batch_invariant: bool,
    expert_bytes: int = 0,  # that this process will hold beside it on the same device
    progress: ProgressCallback | None = None,
    phases: StartupPhases | None = None,
) -> StepRunner:
    """Weights and KV pool of an attention tier. Raises StartupError where they do not fit."""
    if torch.device(device).type == "cuda" and dtype == torch.bfloat16:
        from .device_runner import DeviceRunner  # its kernels' binding only where a GPU is

        try:
            return DeviceRunner.load(
                checkpoint,
                cache,
                scheduler,
                device=device,
                max_model_len=max_model_len,
                expert_bytes=expert_bytes,
                batch_invariant=batch_invariant,
                progress=progress,
                phases=phases,
            )
        except KernelError as error:
            _log.warning("the attention tier runs in plain torch, many times slower than the GPU engine: %s", error)
    return Runner.load(
        checkpoint,
        cache,
        dtype=dtype,
        device=device,
        batch_invariant=batch_invariant,
        progress=progress,
        phases=phases,
    )
