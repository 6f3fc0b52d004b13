"""Which exchange a membership uses, and how it is built: a function of the epoch's record and the configuration, so
that all members choose the same one. Built in the thread that prepares an epoch, beside the running steps."""

from collections.abc import Callable
from typing import Any

from torch.distributed import ProcessGroup

from ..config import ExchangeConfig
from ..errors import EpochError
from .device_exchange import DeviceExchange, LocalDeviceExchange
from .epoch import Epoch
from .exchange import Exchange, LocalExchange, RowShape
from .exchange_gloo import GlooExchange
from .exchange_nccl import NcclExchange
from .exchange_peer import build_peer
from .group import build_nccl


def build_exchange(
    epoch: Epoch,
    rank: int,
    shape: RowShape,
    options: ExchangeConfig,
    least_capacity: int,  # rows of a source in one turn that must be possible: the largest captured step
    build_gloo_group: Callable[[], ProcessGroup],
) -> Exchange | DeviceExchange:
    """Blocks until all members are there; EpochError when one does not come in time."""
    deadlines: dict[str, Any] = {
        "timeout_base_s": options.timeout_base_s,
        "timeout_per_row_s": options.timeout_per_row_s,
    }
    waits_s = options.epoch_timeout_s
    capacity = max(options.max_tokens_per_turn, least_capacity)
    match choose_backend(epoch, options.backend):
        case "local":
            return LocalDeviceExchange(shape.device) if shape.device.type == "cuda" else LocalExchange()
        case "gloo":
            return GlooExchange(build_gloo_group(), epoch, rank, shape, **deadlines)
        case "peer":
            return build_peer(
                epoch, rank, shape, capacity=capacity, epoch_timeout_s=waits_s, slow_start_s=waits_s, **deadlines
            )
        case _:
            group = build_nccl(epoch, rank, shape.device, channels=options.nccl_channels, timeout_s=waits_s)
            return NcclExchange(
                group,
                epoch,
                rank,
                shape,
                capacity=capacity,
                exact_above=options.nccl_exact_above,
                slow_start_s=waits_s,
                **deadlines,
            )


def choose_backend(epoch: Epoch, configured: str) -> str:
    """Which exchange this membership uses: a function of the record and the configuration, so the same everywhere."""
    if len(epoch.members) == 1:
        return "local"
    gpus = {member.gpu for member in epoch.members}
    if "" in gpus and len(gpus) > 1:
        raise EpochError(f"epoch {epoch.number} has members on CPUs and on GPUs: give all the same `device`")
    if configured in ("gloo", "nccl", "peer"):
        if (configured == "gloo") != ("" in gpus):
            raise EpochError(
                f"exchange.backend={configured} with members on {'CPUs' if '' in gpus else 'GPUs'}; use auto"
            )
        return configured
    if "" in gpus:
        return "gloo"
    return "peer" if len({gpu.split("/")[0] for gpu in gpus}) == 1 else "nccl"
