"""What is computed once is shared out among processes, which wait for each other as long as that takes."""

import multiprocessing
import time
from datetime import timedelta
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from conftest import run_in_processes

from cond_diffusion.data.cache import cached_shards

PROCESSES, COUNT, PER_SHARD = 2, 7, 2
LIMIT = timedelta(seconds=6)  # of the process group, as NCCL has one of minutes


def as_process(process: int, folder: Path, all_here: Barrier, told: "Queue[tuple[list[int], list[int]]]"):
    mine: list[int] = []

    def squares(rows: range) -> dict[str, torch.Tensor]:
        mine.extend(rows)
        if process == 1 and rows.start == PER_SHARD:
            time.sleep(LIMIT.total_seconds() + 2)
        return {"squares": torch.tensor(rows) ** 2}

    all_here.wait()
    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=LIMIT)])
    shards = cached_shards(folder, COUNT, PER_SHARD, squares, accelerator, "squaring")
    told.put((mine, torch.cat([shard["squares"] for shard in shards]).tolist()))


def test_two_processes_share_the_work_and_the_faster_waits_longer_than_their_group_would(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    all_here, told = context.Barrier(PROCESSES), context.Queue()
    run_in_processes(PROCESSES, as_process, tmp_path, all_here, told)
    (first, found), (second, same) = (told.get() for _ in range(PROCESSES))
    assert sorted([first, second]) == [[0, 1, 4, 5], [2, 3, 6]]
    assert found == same == [i**2 for i in range(COUNT)]
    assert len(list(tmp_path.iterdir())) == 4
