"""The reference implementation, facebookresearch/dino, from a checkout: its modules, also where there is no CUDA.

    main_dino, utils, vision_transformer = load("DIR", *FILES)
    with stay("cpu"):                                       # its device calls do nothing
        main_dino.train_one_epoch(...)
"""

import contextlib
import importlib
import os
import sys
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

FILES = ("main_dino", "utils", "vision_transformer")


class ReferenceImplementationError(ValueError):
    """There is no reference, or nothing that it can do alike."""


def import_reference(folder, *names):
    """Modules of a checkout."""
    if not os.path.isfile(os.path.join(folder, "main_dino.py")):
        raise ReferenceImplementationError(f"{folder}: no checkout of facebookresearch/dino (main_dino.py is missing)")
    sys.path.insert(0, folder)
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(folder)


def stub_cuda_calls(device):
    """While it lasts, calls of .cuda() and torch.cuda.synchronize() do nothing, if the device is not CUDA."""
    context = contextlib.ExitStack()
    if device != "cuda":
        for kind in (torch.Tensor, nn.Module):
            context.enter_context(mock.patch.object(kind, "cuda", lambda self, *args, **kwargs: self))
        context.enter_context(mock.patch.object(torch.cuda, "synchronize", lambda: None))
    return context


def init_single_process(device):
    """A process group of this process alone: its loss needs one."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
