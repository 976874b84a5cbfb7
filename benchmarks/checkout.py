"""Import facebookresearch/dino from a checkout and run it in a single process, with or without CUDA.

    main_dino, utils, vision_transformer = import_reference(checkout)
    init_single_process("cpu")
    with stub_cuda_calls("cpu"):
        main_dino.train_one_epoch(SingleProcess(student), ...)
"""

import contextlib
import importlib
import os
import sys
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

MODULES = ("main_dino", "utils", "vision_transformer")


class ReferenceImplementationError(ValueError):
    """The checkout is missing, or the reference implementation does not support what is asked for."""


def import_reference(checkout, names=MODULES):
    """List of the named modules of a checkout."""
    if not os.path.isfile(os.path.join(checkout, "main_dino.py")):
        raise ReferenceImplementationError(
            f"{checkout}: no checkout of facebookresearch/dino (main_dino.py is missing)")
    sys.path.insert(0, checkout)
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(checkout)


@contextlib.contextmanager
def stub_cuda_calls(device):
    """Make .cuda() and torch.cuda.synchronize() do nothing, unless `device` is cuda."""
    with contextlib.ExitStack() as patches:
        if device != "cuda":
            for owner in (torch.Tensor, nn.Module):
                patches.enter_context(mock.patch.object(owner, "cuda", lambda self, *args, **kwargs: self))
            patches.enter_context(mock.patch.object(torch.cuda, "synchronize", lambda: None))
        yield


def init_single_process(device):
    """Process group of one process, which the reference's loss needs."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)


class SingleProcess(nn.Module):
    """Network with a `module` attribute: replaces DistributedDataParallel, without its cost."""

    def __init__(self, module, device_ids=None):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)
