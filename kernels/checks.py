"""What a kernel's wrapper asks of a tensor before it passes its address on: a readable sentence where it is not so."""

from collections.abc import Sequence

import torch

from ..errors import KernelError


def require(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: Sequence[int | None]) -> torch.Tensor:
    """`tensor` on a GPU, contiguous, of this dtype and shape (None = any length); returns it."""
    if tensor.is_cuda and tensor.dtype is dtype and tensor.is_contiguous() and _fits(tensor.shape, shape):
        return tensor
    wanted = ", ".join("any" if n is None else str(n) for n in shape)
    raise KernelError(
        f"{name} must be contiguous {dtype} [{wanted}] on a GPU, got {tensor.dtype} {list(tensor.shape)}, "
        f"strides {list(tensor.stride())} on {tensor.device}"
    )


def _fits(have: Sequence[int], wanted: Sequence[int | None]) -> bool:
    if len(have) != len(wanted):
        return False
    for size, want in zip(have, wanted):  # noqa: SIM110  # a third of the time of all(): this runs for every launch
        if want is not None and want != size:
            return False
    return True


def require_sizes(condition: bool, what: str) -> None:
    """Sizes that no variant of the kernel is compiled for."""
    if not condition:
        raise KernelError(what)
