"""What is computed once and kept on the disk: safetensors, a part in each, mapped into memory and shared by processes.

A folder is named by a hash of all that decides the numbers in it, so they cannot be out of date. What was written
before an interruption is not computed again.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, distributed
from tqdm.auto import tqdm

from cond_diffusion.errors import UserError, first_line
from cond_diffusion.files import save_tensors

PATIENCE = timedelta(days=7)  # for the others to finish their share

Tensors = dict[str, Tensor]


def computed_once(
    folder: Path, count: int, per_shard: int, compute: Callable[[range], Tensors], accelerator: Accelerator, what: str
) -> list[Tensors]:
    """Return the tensors of rows 0 to count - 1, `per_shard` rows at a time, out of `folder`; `compute` those that are
    not there yet. The processes of a machine share the work.

    what: in words, for the progress bar and for the UserError where they cannot be written.
    """
    # A group of its own, made while all are here: the one that gradients go through gives up after some minutes.
    waiting: Any = distributed.new_group(backend="gloo", timeout=PATIENCE) if accelerator.num_processes > 1 else None
    parts = [range(start, min(start + per_shard, count)) for start in range(0, count, per_shard)]
    files = [folder / f"{number:05d}.safetensors" for number in range(len(parts))]
    mine = slice(accelerator.local_process_index, None, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    todo = [(rows, file) for rows, file in list(zip(parts, files, strict=True))[mine] if not _is_whole(file)]
    hidden = not (todo and accelerator.is_main_process)
    with tqdm(total=sum(len(rows) for rows, _ in todo), desc=what, disable=hidden, leave=False) as bar:
        for rows, file in todo:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in compute(rows).items()}
            try:
                save_tensors(tensors, file)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{what}: cannot be kept in {folder}: {first_line(error)}", of_this_process=True
                ) from error
            bar.update(len(rows))
    if waiting is not None:
        distributed.barrier(waiting)
    return [load_file(file) for file in files]


def _is_whole(file: Path) -> bool:
    """Say whether `file` is there, and as long as it says it is."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False
