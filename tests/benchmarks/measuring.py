"""Utilities of the benchmarks: hardware description, timing, FLOP and memory counts."""

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode


def hardware() -> str:
    """Return the names of the CPU or GPU, and the version of torch."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{torch.get_num_threads()} cores of {names[0] if names else platform.machine()}, torch {torch.__version__}"


def finished() -> None:
    """Wait until asynchronous work on the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(functions: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, float]:
    """Return the median time of each function. Calls are interleaved, so that other load affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    gc.disable()
    for _ in range(warm_up + rounds):
        for name, function in functions.items():
            finished()
            start = time.perf_counter()
            function()
            finished()
            times[name].append(time.perf_counter() - start)
    gc.enable()
    return {name: statistics.median(measured[warm_up:]) for name, measured in times.items()}


def flop(function: Callable[[], object]) -> int:
    """Count the floating-point operations of the matrix products and convolutions in a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_flop_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the peak throughput of the machine by a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds({"product": lambda: a @ b}, rounds=7)["product"]


def memory_gb() -> float:
    """Return the memory in use on the GPU, or by this process."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9


def peak_memory_gb() -> float:
    """Return the peak memory use on the GPU, or by this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    # Not ru_maxrss, which a new process takes over from the one that started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9
