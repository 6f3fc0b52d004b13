"""What a kernel's wrapper asks of a tensor before it passes its address on: a readable sentence where it is not so."""

from collections.abc import Sequence

import torch

from ..errors import KernelError


def require(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: Sequence[int | None]) -> torch.Tensor:
    """`tensor` on a GPU, contiguous, of this dtype and shape (None = any length); returns it."""
    fits = tensor.dim() == len(shape) and all(want in (None, have) for want, have in zip(shape, tensor.shape))
    if tensor.is_cuda and fits and tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    wanted = ", ".join("any" if n is None else str(n) for n in shape)
    raise KernelError(
        f"{name} must be contiguous {dtype} [{wanted}] on a GPU, got {tensor.dtype} {list(tensor.shape)}, "
        f"strides {list(tensor.stride())} on {tensor.device}"
    )


def require_sizes(condition: bool, what: str) -> None:
    """Sizes that no variant of the kernel is compiled for."""
    if not condition:
        raise KernelError(what)
