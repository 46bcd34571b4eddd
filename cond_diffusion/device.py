"""What the hardware computes fastest in, and CPU settings of torch and the memory allocator."""

import ctypes
import logging
import os
import platform
import sys

import psutil
import torch

from cond_diffusion.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

logger = logging.getLogger(__name__)


def cores_of_this_process() -> int:
    """Return the number of CPU cores per process on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes_of_machine())


def processes_of_machine() -> int:
    """Return the number of processes of this run on this machine, as launchers set it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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


def free_memory(device: torch.device | None = None) -> int:
    """Return the free bytes of a CUDA device, or of the machine's memory for another device or None."""
    if device is not None and device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch uses it again
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


def check_memory(what: str, needed: int, device: torch.device | None = None) -> None:
    """Raise UserError if `needed` bytes, a lower bound, exceed the free memory; `what` names the options to reduce, and
    their values."""
    if needed > (free := free_memory(device)):
        message = f"{what}: at least {needed / 1e9:.3g} GB of memory are needed, {free / 1e9:.3g} GB are free"
        raise UserError(message, of_this_process=True)


def has_bf16() -> bool:
    """Return whether this CPU has bf16 instructions; without them bf16 is many times slower than fp32."""
    if not torch.backends.mkldnn.is_available():  # for example on Apple Silicon
        return False
    # On x86, the first check is true for any CPU with AVX-512.
    x86 = platform.machine() in ("x86_64", "AMD64")
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
        not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def is_emulated(precision: str, device: torch.device) -> bool:
    """Return whether the device has no instructions for "bf16" or "fp16", and is many times slower than in fp32."""
    return device.type == "cpu" and (precision == "fp16" or (precision == "bf16" and not has_bf16()))


def choose_precision(requested: str, device: torch.device, key: str) -> str:
    """Return the precision to compute in, "fp32", "bf16" or "fp16": for "auto" bf16 where the device computes faster in
    it, and fp32 elsewhere."""
    if requested != "auto":
        if is_emulated(requested, device):
            logger.warning("%s: %s is slower than fp32 on this CPU, which has no instructions for it", key, requested)
        return requested
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    chosen = "bf16" if on_gpu or (device.type == "cpu" and has_bf16()) else "fp32"
    logger.info("%s: auto: computing in %s on %s", key, chosen, device)
    return chosen


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return a context manager in which matrix products and convolutions run in `precision`; "fp32" disables autocast.

    Weights stay fp32, and so do the statistics of norms, the sums of softmax and everything outside the network. Within
    one context, weights are cast once.
    """
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def is_main_process() -> bool:
    """Return whether this process has rank 0."""
    return os.environ.get("RANK", "0") == "0"
