"""Compile checks of kernels, several at once: NVRTC lets other threads run, so two cores need half the time."""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from expertmesh.kernels import jit


def compile_each(cases: Iterable[tuple[str, str, Mapping[str, int]]]) -> list[jit.Compiled]:
    """(file, architecture, defines) of each -> what came out, in their order. KernelError of the first that fails."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda case: jit.compile_only(*case), cases))


def compile_for(archs: Iterable[str], file: str, defines: Mapping[str, int]) -> list[jit.Compiled]:
    """One kernel for each of these architectures."""
    return compile_each((file, arch, defines) for arch in archs)
