"""CPU features, and CPU settings of torch and the memory allocator."""

import ctypes
import os
import platform
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def cores_of_this_process() -> int:
    """Return the number of CPU cores per process on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def share_cores() -> None:
    """Set torch's number of threads to the cores per process, unless OMP_NUM_THREADS is set to another value than 1.

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1 by default, which leaves all other cores idle.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(cores_of_this_process())


def keep_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the kernel.

    By default, glibc maps and zeroes new pages for each large tensor, which costs about a tenth of a training step.
    Other allocators are left unchanged.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # glibc's maximum
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def has_bf16() -> bool:
    """Return whether this CPU has bf16 instructions; without them bf16 is many times slower than fp32."""
    # On x86, the first check is true for any CPU with AVX-512.
    x86 = platform.machine() in ("x86_64", "AMD64")
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
        not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def is_main_process() -> bool:
    """Return whether this process has rank 0."""
    return os.environ.get("RANK", "0") == "0"
