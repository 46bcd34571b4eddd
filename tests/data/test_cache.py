"""Processes share the computation of cached shards and wait for each other without a timeout."""

import multiprocessing
from datetime import timedelta
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from conftest import run_in_processes
from torch import distributed

from cond_diffusion.data import cache
from cond_diffusion.data.cache import cached_shards

PROCESSES, COUNT, PER_SHARD = 2, 7, 2
GROUP_TIMEOUT = timedelta(minutes=1)  # of the process group; the default of NCCL is some minutes


def as_process(process: int, folder: Path, barrier: Barrier, results: "Queue[tuple[list[int], list[int]]]"):
    computed: list[int] = []

    def squares(rows: range) -> dict[str, torch.Tensor]:
        computed.extend(rows)
        return {"squares": torch.tensor(rows) ** 2}

    def barrier_with_timeout(group: Any) -> None:
        timeouts.append(group._get_backend(torch.device("cpu")).options._timeout)
        distributed.barrier(group)

    timeouts: list[timedelta] = []
    cache.distributed = SimpleNamespace(new_group=distributed.new_group, barrier=barrier_with_timeout)  # type: ignore[assignment]
    barrier.wait()
    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=GROUP_TIMEOUT)])
    shards = cached_shards(folder, COUNT, PER_SHARD, squares, accelerator, "squaring")
    assert timeouts == [cache.TIMEOUT]  # not that of the default group
    results.put((computed, torch.cat([shard["squares"] for shard in shards]).tolist()))


@pytest.mark.slow
def test_two_processes_share_the_work_and_wait_with_a_timeout_of_their_own(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(PROCESSES), context.Queue()
    run_in_processes(PROCESSES, as_process, tmp_path, barrier, results)
    (first, squares), (second, same) = (results.get() for _ in range(PROCESSES))
    assert sorted([first, second]) == [[0, 1, 4, 5], [2, 3, 6]]
    assert squares == same == [i**2 for i in range(COUNT)]
    assert len(list(tmp_path.iterdir())) == 4
