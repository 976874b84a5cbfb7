"""Dry run: a run of two steps in a temporary folder, and what the whole run will take.

    with temporary_run(args):
        ...                                         # the run, which saves after its second step
        print_estimate(run, total_steps, args)
"""

import contextlib
import shutil
import tempfile
import time
from pathlib import Path

from common import distributed
from common.estimate import format_duration
from common.memory import peak_memory


@contextlib.contextmanager
def temporary_run(args):
    """Make args those of a run in a temporary folder on the disk of --output_dir, which the context removes.

    The same folder on all ranks. Every step is logged, and k-NN takes few images.
    """
    path = Path(args.output_dir).absolute()
    parent = next(folder for folder in (path, *path.parents) if folder.is_dir())
    with contextlib.ExitStack() as stack:
        folder = None
        if distributed.is_rank_zero():
            for old in parent.glob(".dry_run-*"):
                if time.time() - old.stat().st_mtime > 86400:  # left by one that was killed
                    shutil.rmtree(old, ignore_errors=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".dry_run-", dir=parent,
                                                                     ignore_cleanup_errors=True))
        args.output_dir = distributed.all_gather_objects(folder)[0]
        args.resume, args.overwrite, args.knn_images = "auto", False, min(args.knn_images, 500)
        args.log_every, args.save_every_steps = 1, 2
        yield
        distributed.wait_for_all_ranks()  # all have read what is removed now


def print_estimate(run, total_steps, args):
    """Resume from the checkpoint of a dry run, and print what the whole run will take."""
    distributed.wait_for_all_ranks()  # rank 0 has saved
    checkpoint, disk, memory = run.path.stat(), shutil.disk_usage(run.path.parent), peak_memory(args.device)
    run.start(args, total_steps)
    seconds = run.logger.step_time
    run.logger.print(
        f"dry run: {memory / 1e9:.1f} GB of memory; {seconds:.2f} seconds per step, about "
        f"{format_duration(seconds * total_steps)} for {total_steps} steps without evaluation; checkpoints "
        f"of {checkpoint.st_size / 1e6:.0f} MB, {disk.free / 1e9:.0f} GB free; nothing was kept")
