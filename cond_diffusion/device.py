"""What a CPU can do, and what torch and the system are told before it computes."""

import ctypes
import os
import platform
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def cores_of_this_process() -> int:
    """Return this process's share of the machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def share_cores() -> None:
    """Share this machine's cores among its processes.

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1 for whoever did not set it, and all cores but one stand
    idle.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(cores_of_this_process())


def keep_memory() -> None:
    """Let glibc keep what is freed for the next step, instead of asking the kernel for new, empty pages each time.

    Every feature map of a batch is large enough that it would be; that costs about a tenth of a step. Other systems'
    allocators are left as they are.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the highest that glibc takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def has_bf16() -> bool:
    """Say whether this CPU has instructions for bf16; without them it is many times slower in it than in fp32."""
    # On x86 the first alone asks for no more than AVX-512.
    x86 = platform.machine() in ("x86_64", "AMD64")
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
        not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def is_main_process() -> bool:
    """Whether this is the process that shows progress bars, of those that were launched together."""
    return os.environ.get("RANK", "0") == "0"
