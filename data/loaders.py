"""Deterministic sampling and data loaders. Order and crops depend on (seed, epoch, index) only.

    multicrop = build_multicrop(args)                                    # from the flags of cli.add_crop_flags
    keys = iter_batch_keys(0, 1000, len(images), seed=0, batch_size=64)
    loader = build_train_loader(images, multicrop, keys, seed=0, num_workers=8)
    for crops, labels, corrupt in iter_on_device(loader, multicrop, torch.device("cuda")): ...
    for images, labels, indices, corrupt in build_eval_loader(images, size=224, batch_size=128): ...

No random state is consumed, so a run that resumes at step 700 asks for the keys from step 700 on, and neither the
number of processes nor that of workers changes what a step sees. `images` is a sequence of (image, label), a PIL image
or tensor as of `read_image`, that raises OSError for an image that cannot be decoded; such images are skipped, and
`corrupt` lists the messages.
"""

import contextlib
import functools
import random

import numpy as np
import torch
from torchvision.transforms import functional as TF

from augment import IMAGENET_MEAN, IMAGENET_STD, BatchMultiCrop, EvalTransform, MultiCrop
from common.distributed import TIMEOUT_MINUTES
from data.datasets import read_reduced
from data.order import block_order, derive_seed, full_order
from data.workers import DataLoader

MAX_CORRUPT_IN_A_ROW = 1000  # images; more means that the storage fails, not the images


# ---- training ----

def iter_batch_keys(first_step, last_step, num_images, seed, batch_size, accum_steps=1, rank=0, world_size=1,
                    shuffle="full"):
    """Yield the (epoch, index) keys of each micro-batch of this rank, from first_step to before last_step.

    Each epoch is one permutation of the images, cut into steps, then ranks, then micro-batches, so the images of a
    step do not depend on the number of ranks. The images left over after the last full step of an epoch are dropped.

    Args:
        shuffle: key of ORDERS.
    """
    per_rank = batch_size * accum_steps
    steps_per_epoch = num_images // (per_rank * world_size)
    for step in range(first_step, last_step):
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        positions = np.arange(per_rank) + (step_in_epoch * world_size + rank) * per_rank
        indices = ORDERS[shuffle](positions, num_images, seed, epoch)
        for micro_batch in indices.reshape(accum_steps, -1).tolist():
            yield [(epoch, index) for index in micro_batch]


def torch_order(positions, num_images, seed, epoch):
    """Order of runs that began before data/order.py."""
    return draw_permutation(num_images, derive_seed("order", seed, epoch))[positions]


@functools.lru_cache(maxsize=1)
def draw_permutation(num_images, seed):
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(seed)).numpy()


ORDERS = {"full": full_order, "blocks": block_order, "randperm": torch_order}  # (positions, images, seed, epoch)


def build_multicrop(args, compile=False, channels=None, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Multi-crop augmentation from the crop flags: MultiCrop for --views cpu, BatchMultiCrop for --views device.

    Args:
        channels, mean, std: see `MultiCrop`.
    """
    brightness, contrast, saturation, hue = args.color_jitter
    kind = functools.partial(BatchMultiCrop, compile=compile) if args.views == "device" else MultiCrop
    return kind(args.global_crops_size, args.global_crops_scale, args.local_crops_size, args.local_crops_scale,
                args.local_crops_number, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue,
                blur=args.blur, blur_radius=args.blur_radius, mean=mean, std=std,
                vertical_flip=0.5 * args.vertical_flip, rotate90=args.rotate90, channels=channels)


class MultiCropDataset(torch.utils.data.Dataset):
    """(epoch, index) -> crops of one image, its label, messages on corrupt images.

    The crops are V tensors from a MultiCrop, or pixels and crop parameters from BatchMultiCrop.prepare. The next
    readable image takes the place of a corrupt one, so that batches keep their size.
    """

    def __init__(self, images, multicrop, seed):
        self.images, self.multicrop, self.seed = images, multicrop, seed
        self.make_crops = multicrop.prepare if isinstance(multicrop, BatchMultiCrop) else multicrop

    def __getitem__(self, key):
        epoch, index = key
        corrupt = []
        for i in range(index, index + min(len(self.images), MAX_CORRUPT_IN_A_ROW)):
            try:
                image, label = read_reduced(self.images, i % len(self.images), self.multicrop.reduction)
            except OSError as error:
                corrupt.append(str(error))
                continue
            return self.make_crops(image, key=(self.seed, epoch, index)), label, corrupt
        raise OSError(f"{len(corrupt)} images in a row cannot be read; the last: {corrupt[-1]}")


def collate_crops(samples):
    """B samples of MultiCropDataset -> V tensors [B, C, s, s], labels [B], messages."""
    crops, labels, messages = zip(*samples)
    return [torch.stack(view) for view in zip(*crops)], torch.tensor(labels), sum(messages, [])


def collate_pixels(samples):
    """B samples for BatchMultiCrop -> (pixels of all images [N, C], crop parameters [B, V, P]), labels, messages."""
    prepared, labels, messages = zip(*samples)
    pixels, params = zip(*prepared)  # concatenated, because every tensor that a worker sends takes a file descriptor
    return (torch.cat(pixels), torch.stack(params)), torch.tensor(labels), sum(messages, [])


def build_train_loader(images, multicrop, keys, seed, num_workers=0, pin_memory=False, timeout_minutes=TIMEOUT_MINUTES):
    """DataLoader with one batch of collate_crops (or collate_pixels, see iter_on_device) per list of keys."""
    return DataLoader(
        MultiCropDataset(images, multicrop, seed), batch_sampler=keys, num_workers=num_workers, pin_memory=pin_memory,
        collate_fn=collate_pixels if isinstance(multicrop, BatchMultiCrop) else collate_crops,
        timeout_minutes=timeout_minutes)


def iter_on_device(loader, multicrop, device):
    """Yield (V tensors [B, C, s, s], labels [B], messages) on `device`; on CUDA from a side stream."""
    def to_device(tensor):
        return tensor.to(device, non_blocking=tensor.is_pinned())

    def make_crops(batch):
        if not isinstance(multicrop, BatchMultiCrop):
            return [to_device(view) for view in batch]
        pixels, params = batch
        return multicrop(to_device(pixels), params)

    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch, labels, messages in loader:
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            crops, labels = make_crops(batch), to_device(labels)
        if stream:
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            for tensor in (*crops, labels):
                tensor.record_stream(current)
        yield crops, labels, messages


# ---- evaluation ----

def random_subset(images, max_images):
    """At most `max_images` of the images, the same ones every time."""
    indices = range(len(images))
    if max_images < len(images):
        indices = sorted(random.Random(0).sample(indices, max_images))
    return torch.utils.data.Subset(images, indices)


def normalize(image, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """RGB image or [C, H, W] in [0, 1] -> [C, H, W], normalized."""
    image = image if isinstance(image, torch.Tensor) else TF.to_tensor(image)
    return TF.normalize(image, mean, std)


def center_crop_view(image, size, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Image -> [C, size, size], or of a size (height, width), normalized: the view that features are evaluated on."""
    channels = len(image) if isinstance(image, torch.Tensor) else None
    return EvalTransform(size, mean, std, channels)(image)


def build_view(info, view=center_crop_view):
    """A view with the mean and std in the description of a model, see `read_input`; it can be pickled."""
    return functools.partial(view, mean=tuple(info["mean"]), std=tuple(info["std"]))


def default_attention_size(trained_size, patch_size):
    """Shorter side in pixels for attention and patch features: 480 for a model trained at 224, and in proportion."""
    return round(480 / 224 * trained_size / patch_size) * patch_size


def resize_to_patches(image, shorter_side, patch_size):
    """RGB image or [C, H, W], resized (bicubic) so that both sides are multiples of the patch size."""
    _, H, W = TF.get_dimensions(image)
    sides = [count * patch_size for count in compute_patch_grid((H, W), shorter_side, patch_size)]
    return TF.resize(image, sides, TF.InterpolationMode.BICUBIC)


def compute_patch_grid(size, shorter_side, patch_size):
    """Rows and columns of patches of an image of (height, width) pixels after `resize_to_patches`."""
    return [max(1, round(side * shorter_side / min(size) / patch_size)) for side in size]


def collate_views(images, size, view, indices):
    """Read images: views [B, C, H, W], labels [B], indices [B] of the readable ones, messages on corrupt ones."""
    samples, corrupt = [], []
    for i in indices:
        try:
            image, label = images[i]
        except OSError as error:
            corrupt.append(str(error))
        else:
            samples.append((view(image, size), label, i))
    views, labels, indices = zip(*samples) if samples else ((), (), ())
    views = torch.stack(views) if views else torch.empty(0)
    return views, torch.tensor(labels, dtype=torch.int64), torch.tensor(indices, dtype=torch.int64), corrupt


def build_eval_loader(images, size, batch_size, num_workers=0, rank=0, world_size=1, view=center_crop_view,
                      timeout_minutes=TIMEOUT_MINUTES):
    """DataLoader over this rank's share of the images, each image on exactly one rank: batches of collate_views.

    Args:
        view: (image, size) -> [C, H, W].
    """
    return DataLoader(
        range(rank, len(images), world_size), batch_size=batch_size, num_workers=num_workers,
        collate_fn=functools.partial(collate_views, images, size, view), pin_memory=torch.cuda.is_available(),
        timeout_minutes=timeout_minutes)
