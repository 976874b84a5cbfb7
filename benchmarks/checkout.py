"""Import facebookresearch/dino from a checkout and run it with the flags of train.py, in one process, without CUDA too.

    check_flags(flags)
    main_dino, utils, vision_transformer = modules = import_reference(checkout, flags.device)
    with patch_all(list_patches(*modules, flags)):
        main_dino.train_dino(flags)
"""

import collections
import contextlib
import functools
import importlib
import os
import sys
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torchvision.transforms import ColorJitter

from vit import SIZES

MODULES = ("main_dino", "utils", "vision_transformer")
SUPPORTED = dict(  # flags for which the reference implementation has one value only
    teacher="momentum", loss="ce", centering="mean", predictor=False, l2_bottleneck=True, accum_steps=1,
    clip_mode="per_parameter", init=None, layer_decay=1.0, channels=None, normalization=("imagenet",),
    conv_stem=False, koleo_loss_weight=0.0, schedule_epochs=0, vertical_flip=False, rotate90=False)


class ReferenceImplementationError(ValueError):
    """The checkout is missing, or the reference implementation does not support what is asked for."""


def import_reference(checkout, device, *more):
    """List of MODULES and more of a checkout; starts a process group of one process, which its loss needs."""
    if not os.path.isfile(os.path.join(checkout, "main_dino.py")):
        raise ReferenceImplementationError(f"{checkout}: no checkout of facebookresearch/dino (no main_dino.py)")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    with mock.patch.object(sys, "path", [checkout, *sys.path]):
        return [importlib.import_module(name) for name in (*MODULES, *more)]


def check_flags(flags, num_processes=1):
    """Raise ReferenceImplementationError for flags of train.py that the reference implementation has no match for."""
    given = {name: getattr(flags, name) for name in SUPPORTED}
    checks = {f"--{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}": value == SUPPORTED[name]
              for name, value in given.items()}
    checks |= {f"--arch {flags.arch}": flags.arch in SIZES,
               "more than one process": num_processes == 1,
               "--warmup_teacher_temp_epochs above --epochs": flags.warmup_teacher_temp_epochs <= flags.epochs,
               f"--device {flags.device} here": flags.device == "cpu" or torch.cuda.is_available()}
    if not all(checks.values()):
        unsupported = ", ".join(name for name, is_supported in checks.items() if not is_supported)
        raise ReferenceImplementationError(f"the reference implementation does not support {unsupported}")


# ---- replacements for parts of the reference implementation ----

@contextlib.contextmanager
def patch_all(patches):
    """Replace attributes within the context, given as (owner, attribute, replacement)."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value, create=name == "print"))
        yield


def list_patches(main_dino, utils, vision_transformer, flags):
    """Patches for the sizes and strengths of the flags in place of constants, no prints, and no CUDA on a CPU."""
    def stub(self=None, *args, **kwargs):
        return self

    backbone = functools.partial(
        vision_transformer.VisionTransformer, img_size=[flags.global_crops_size], patch_size=flags.patch_size,
        embed_dim=flags.embed_dim, depth=flags.depth, num_heads=flags.num_heads, mlp_ratio=4, qkv_bias=True,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6))
    head = functools.partial(main_dino.DINOHead, nlayers=flags.head_layers, hidden_dim=flags.hidden_dim,
                             bottleneck_dim=flags.bottleneck_dim)
    loss = functools.partial(main_dino.DINOLoss, student_temp=flags.student_temp, center_momentum=flags.center_momentum)
    augmentation = functools.partial(build_augmentation, main_dino.DataAugmentationDINO, flags)
    patches = [(vision_transformer, "vit_small", backbone), (main_dino, "DINOHead", head),
               (main_dino, "DINOLoss", loss), (main_dino, "DataAugmentationDINO", augmentation),
               (main_dino, "print", stub), (utils, "print", stub), (utils, "init_distributed_mode", stub),
               (utils.MetricLogger, "synchronize_between_processes", stub)]
    if flags.device != "cuda":
        patches += [(torch.Tensor, "cuda", stub), (nn.Module, "cuda", stub), (torch.cuda, "synchronize", stub),
                    (nn.parallel, "DistributedDataParallel", wrap_single_process),
                    (utils, "has_batchnorms", lambda network: False)]  # SyncBatchNorm needs CUDA
    return patches


def build_augmentation(kind, flags, *args):
    """kind(*args), its DataAugmentationDINO, with the sizes and strengths of the flags."""
    augmentation = kind(*args)
    transforms = augmentation.global_transfo1, augmentation.global_transfo2, augmentation.local_transfo
    for transform, size, p in zip(transforms, [flags.global_crops_size] * 2 + [flags.local_crops_size], flags.blur):
        crop, color, blur, *_ = transform.transforms
        crop.size = (size, size)
        color.transforms[1].transforms[0] = ColorJitter(*flags.color_jitter)
        blur.prob, (blur.radius_min, blur.radius_max) = p, flags.blur_radius
    return augmentation


def wrap_single_process(network, device_ids=None):
    """Network with a `module` attribute: replaces DistributedDataParallel, without its cost."""
    return nn.Sequential(collections.OrderedDict(module=network))


class TransformedImages(torch.utils.data.Dataset):
    """(epoch, index) -> transformed image and its label; replaces ImageFolder."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        image, label = self.images[key[1]]
        return self.transform(image), label
