"""Which pictures a step sees: batches counted by (seed, epoch, index), and each picture judged once.

    keys = batch_keys(0, 1000, len(images), seed=0, batch_size=64)
    batches = train_loader(images, multicrop, keys, seed=0, num_workers=8)
    for views, labels, unreadable in on_device(batches, multicrop, torch.device("cuda")): ...
    for views, labels, indices, unreadable in eval_loader(images, size=224, batch_size=128): ...

Nothing random is consumed, so nothing is replayed: a run that goes on at step 700 asks for the keys from 700 on,
and neither the number of processes nor that of workers changes what a step sees. `images` is a sequence of
(PIL image, label) whose indexing raises OSError for one that cannot be read. This file needs torch and torchvision.
"""

import os
import random
import signal
import threading

import torch
from torchvision.transforms import functional as TF

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
UNREADABLE_IN_A_ROW = 1000  # pictures; more is no picture's fault


def counted_seed(*key):
    """A seed of 63 bits that depends on the key alone."""
    return random.Random(repr(key)).getrandbits(63)


# ---- to train on ----

def batch_keys(first_step, last_step, num_images, seed, batch_size, accum_steps=1, rank=0, world_size=1):
    """The (epoch, index) keys of every batch of this process, from first_step to before last_step.

    Each epoch is one permutation of the pictures, cut into steps, then processes, then accumulated
    passes: what a step sees does not depend on the number of processes. What is left over by the last
    whole step of an epoch is not seen in it.
    """
    per_step = batch_size * accum_steps * world_size
    steps_per_epoch = num_images // per_step
    order, order_epoch = None, None
    for step in range(first_step, last_step):
        epoch, place = divmod(step, steps_per_epoch)
        if epoch != order_epoch:
            generator = torch.Generator().manual_seed(counted_seed("order", seed, epoch))
            order, order_epoch = torch.randperm(num_images, generator=generator), epoch
        mine = order[place * per_step:(place + 1) * per_step].view(world_size, accum_steps, -1)[rank]
        for batch in mine.tolist():
            yield [(epoch, index) for index in batch]


class Views(torch.utils.data.Dataset):
    """(epoch, index) -> what a multicrop makes of one picture, its label, and messages about unreadable pictures.

    That is all views from a MultiCrop, pixels and plan from a BatchMultiCrop. An unreadable picture's place is
    taken by the next readable one, so that batches stay whole.
    """

    def __init__(self, images, multicrop, seed):
        self.images, self.multicrop, self.seed = images, multicrop, seed
        self.make = multicrop.prepare if makes_batches(multicrop) else multicrop

    def __getitem__(self, key):
        epoch, index = key
        unreadable = []
        for i in range(index, index + min(len(self.images), UNREADABLE_IN_A_ROW)):
            try:
                image, label = self.open(i % len(self.images))
            except OSError as error:
                unreadable.append(str(error))
                continue
            return self.make(image, key=(self.seed, epoch, index)), label, unreadable
        raise OSError(f"{len(unreadable)} pictures in a row cannot be read any more; the last is {unreadable[-1]}")

    def open(self, i):
        """Picture i, reduced as far as its views cannot tell, and its label; a set may have a quicker way to reduce."""
        images = self.images
        while isinstance(images, torch.utils.data.Subset):
            images, i = images.dataset, images.indices[i]
        if hasattr(images, "open_reduced"):
            return images.open_reduced(i, self.multicrop.reduction)
        image, label = images[i]
        factor = self.multicrop.reduction(*image.size)
        return image.reduce(factor) if factor > 1 else image, label


def makes_batches(multicrop):
    return hasattr(multicrop, "prepare")


def collate_views(samples):
    """B samples of Views -> V tensors [B, 3, s, s], labels [B], and all messages."""
    made, labels, messages = zip(*samples)
    return [torch.stack(view) for view in zip(*made)], torch.tensor(labels), sum(messages, [])


def collate_pictures(samples):
    """The same for pictures that a device makes views of: (their bytes one behind the other, sizes, plans)."""
    made, labels, messages = zip(*samples)
    pixels, plans = zip(*made)  # one tensor for all: each that is sent takes a file descriptor
    sizes = torch.tensor([p.shape for p in pixels])
    batch = (torch.cat([p.flatten() for p in pixels]), sizes, torch.stack(plans))
    return batch, torch.tensor(labels), sum(messages, [])


def train_loader(images, multicrop, keys, seed, num_workers=0, pin_memory=False):
    """Batches of (V view tensors [B, 3, s, s], labels [B], messages on unreadable pictures), one per list of keys.

    With a BatchMultiCrop workers only decode; the views come from `on_device`.
    """
    collate = collate_pictures if makes_batches(multicrop) else collate_views
    return torch.utils.data.DataLoader(
        Views(images, multicrop, seed), batch_sampler=keys, num_workers=num_workers, collate_fn=collate,
        pin_memory=pin_memory, worker_init_fn=outlive_signals)


def on_device(batches, multicrop, device):
    """Batches of train_loader, their views made on a device; on CUDA on a stream of its own, beside the step."""
    def send(tensor):
        return tensor.to(device, non_blocking=tensor.is_pinned())

    def make(batch):
        if not makes_batches(multicrop):
            return [send(view) for view in batch]
        pixels, sizes, plans = batch
        parts = send(pixels).split(sizes.prod(dim=1).tolist())
        return multicrop([part.view(size) for part, size in zip(parts, sizes.tolist())], plans)

    if device.type != "cuda":
        for batch, labels, messages in batches:
            yield make(batch), labels.to(device), messages
        return
    stream = torch.cuda.Stream(device, priority=-1)
    for batch, labels, messages in batches:
        with torch.cuda.stream(stream):
            views, labels = make(batch), send(labels)
        here = torch.cuda.current_stream(device)
        here.wait_stream(stream)
        for tensor in (*views, labels):
            tensor.record_stream(here)
        yield views, labels, messages


# ---- to judge features on ----

def some_of(images, most):
    """At most so many of the images, always the same ones, drawn at random: an even step may fall in with classes."""
    if len(images) <= most:
        return images
    return torch.utils.data.Subset(images, sorted(random.Random(0).sample(range(len(images)), most)))


def eval_view(image, height, width=None):
    """RGB image -> [3, height, width], normalised: the one view that features are judged on.

    The shorter side is resized to the crop's / 0.875 (bicubic), then the centre is cut out, as ImageNet
    is evaluated (256 and 224). A picture that already has the size is taken as it is.
    """
    width = width or height
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height) / 0.875
        image = TF.resize(image, round(min(image.size) * scale), TF.InterpolationMode.BICUBIC)
        image = TF.center_crop(image, [height, width])
    return normalised(image)


def large_size(trained_size, patch_size):
    """Shorter side, pixels, at which attention is looked at: 480 for a model trained at 224, and in proportion."""
    return round(480 / 224 * trained_size / patch_size) * patch_size


def whole_view(image, shorter, patch_size):
    """The whole of an RGB image or [3, H, W], resized so that patches fill it: about `shorter` pixels, bicubic."""
    _, H, W = TF.get_dimensions(image)
    sides = [max(1, round(side * shorter / min(H, W) / patch_size)) * patch_size for side in (H, W)]
    return TF.resize(image, sides, TF.InterpolationMode.BICUBIC)


def normalised(image):
    """RGB image or [3, H, W] in [0, 1] -> [3, H, W], less ImageNet's mean over its standard deviation."""
    image = image if isinstance(image, torch.Tensor) else TF.to_tensor(image)
    return TF.normalize(image, IMAGENET_MEAN, IMAGENET_STD)


class EvalViews(torch.utils.data.Dataset):
    """One view of each picture: index -> (view, label, index), or (None, reason, index)."""

    def __init__(self, images, size, view):
        self.images, self.size, self.view = images, size, view

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        try:
            image, label = self.images[index]
        except OSError as error:
            return None, str(error), index
        return self.view(image, self.size), label, index


def collate_readable(samples):
    """Samples of EvalViews -> images [B, 3, H, W], labels [B], indices [B], messages of those left out."""
    readable = [sample for sample in samples if sample[0] is not None]
    views = torch.stack([view for view, _, _ in readable]) if readable else torch.empty(0)
    labels = torch.tensor([label for _, label, _ in readable], dtype=torch.int64)
    indices = torch.tensor([index for _, _, index in readable], dtype=torch.int64)
    return views, labels, indices, [reason for view, reason, _ in samples if view is None]


def eval_loader(images, size, batch_size, num_workers=0, rank=0, world_size=1, view=eval_view):
    """Batches of views, each picture on one of the processes: (images, labels, indices, unreadable).

    Args:
        view: (RGB image, size) -> [3, H, W]; the centre view if it is not given.
    """
    share = torch.utils.data.Subset(EvalViews(images, size, view), range(rank, len(images), world_size))
    return torch.utils.data.DataLoader(share, batch_size, num_workers=num_workers, collate_fn=collate_readable,
                                       pin_memory=torch.cuda.is_available(), worker_init_fn=outlive_signals)


# ---- workers ----

def outlive_signals(worker):
    """Let a worker end by its parent's will alone: what is sent to the whole job (Ctrl-C, preemption) passes it by.

    Otherwise its death would end the parent before the parent has saved.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # torch ends workers by SIGTERM, so that one must be told apart
        def wait():
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
                pass
            os._exit(0)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    for world_size in (1, 2):
        steps = [list(batch_keys(0, 2, 20, 0, 8 // world_size, 1, rank, world_size)) for rank in range(world_size)]
        for step in range(2):
            print(f"{world_size} processes, step {step}:", [[index for _, index in rank[step]] for rank in steps])
