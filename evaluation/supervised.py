"""Training with labels: linear classifiers on a backbone that stays as it is, or is fine-tuned with one of them.

    network = Classifiers(Tokens(backbone, n_last_blocks=4), num_classes=1000, count=3)           # frozen
    optimizer = build_optimizer("sgd", head_groups(network, [(0.001, 0.0), (0.01, 0.0), (0.1, 0.0)]))

    network = Classifiers(Tokens(backbone, n_last_blocks=1), num_classes=10, frozen=False)        # fine-tuned
    optimizer = build_optimizer("adamw", layer_groups(network, lr=0.0005, weight_decay=0.05, layer_decay=0.75))

    losses = train_step(network, optimizer, scaler, images, labels, rate=0.5)                     # one step
    finished = train(network, optimizer, pictures, fixed, measure, folder, size=224, ...)         # all of them

Caron et al. 2021, section 4: linear classification and fine-tuning. `train` can be killed and goes on like train.py.
"""

import contextlib
import math
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from augment import BatchMultiCrop, MultiCrop
from backbones import broadcast_buffers, convert_sync_batchnorm
from common import distributed
from common.checkpoint import prepare_output_dir, resume_run, save_checkpoint, was_restarted
from common.logger import Logger
from common.precision import autocast, set_matmul_precision
from data.datasets import DataError
from data.loaders import build_train_loader, derive_seed, iter_batch_keys, iter_on_device
from dino_loss import cosine_schedule

# ---- networks ----


class FeatureExtractor(nn.Module):
    """The paper's input of a linear classifier: CLS tokens of the last blocks, by request the mean patch token.

    Args:
        n_last_blocks: 4 for ViT-S, 1 for ViT-B; those beyond the backbone's are clamped.
        avgpool: put the mean of the last block's patch tokens behind them, as for ViT-B.
    """

    def __init__(self, backbone, n_last_blocks=1, avgpool=False):
        super().__init__()
        self.backbone, self.avgpool = backbone, avgpool
        self.n_last_blocks = min(n_last_blocks, max(1, len(backbone.blocks)))  # of other backbones there is a feature
        self.dim = backbone.embed_dim * (self.n_last_blocks + avgpool)

    def forward(self, x):  # [B, C, H, W] -> [B, dim]
        if self.n_last_blocks == 1 and not self.avgpool:
            return self.backbone(x)  # the same, with stochastic depth
        tokens = self.backbone.get_intermediate_layers(x, self.n_last_blocks)
        patches = [tokens[-1][:, 1:].mean(dim=1)] if self.avgpool else []
        return torch.cat([t[:, 0] for t in tokens] + patches, dim=1)


class Classifiers(nn.Module):
    """Images [B, C, H, W] -> logits [G, B, K]: G linear classifiers of K classes on the same features.

    Args:
        tokens: Tokens of a backbone.
        frozen: whether the backbone learns nothing, and stays in eval mode.
    """

    def __init__(self, tokens, num_classes, count=1, frozen=True):
        super().__init__()
        self.tokens, self.frozen = tokens.requires_grad_(not frozen), frozen
        self.heads = nn.ModuleList(nn.Linear(tokens.dim, num_classes) for _ in range(count))
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, x):
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            features = self.tokens(x)
        with torch.autocast(x.device.type, enabled=False):
            return torch.stack([head(features.float()) for head in self.heads])

    def train_classifiers(self, mode=True):
        super().train(mode)
        self.tokens.train(mode and not self.frozen)
        return self


# ---- one step ----

def build_head_groups(network, grid):
    """Parameter groups for classifiers on frozen features, one pair (lr, weight_decay) of the grid for each."""
    return [{"params": list(head.named_parameters()), "peak": lr, "weight_decay": weight_decay}
            for head, (lr, weight_decay) in zip(network.heads, grid)]


def build_layer_decay_groups(network, lr, weight_decay, layer_decay):
    """Parameter groups for fine-tuning: the learning rate falls by `layer_decay` from each block to the one before.

    The classifier has `lr`, the last block and the norm behind it one factor less, the embeddings one less than the
    first block (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT). All of a backbone without blocks has one factor
    less. Biases and norms have no weight decay.
    """
    backbone, groups = network.tokens.backbone, {}
    depth = len(backbone.blocks)
    layers = {id(p): i + 1 for i, block in enumerate(backbone.blocks) for p in block.parameters()}
    layers |= {id(p): depth for p in backbone.norm.parameters()} if depth else {}
    layers |= {id(p): depth + 1 for p in network.heads.parameters()}
    for name, p in network.named_parameters():
        layer, decay = layers.get(id(p), 0), weight_decay if p.ndim > 1 else 0.0
        group = {"params": [], "peak": lr * layer_decay ** (depth + 1 - layer), "weight_decay": decay}
        groups.setdefault((layer, decay), group)["params"].append((name, p))
    return list(groups.values())


def build_mixup(num_classes, mixup, cutmix):
    """(images, labels) -> both mixed with those of other pictures, labels as shares [B, K]; None for no mixing.

    Args:
        mixup, cutmix: the parameter alpha of Zhang et al. 2018 and Yun et al. 2019, 0 for none; of both each batch
            takes one.
    """
    kinds = [kind(alpha=alpha, num_classes=num_classes)
             for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    return v2.RandomChoice(kinds) if kinds else None


def supervised_step(network, optimizer, scaler, images, labels, rate=1.0, precision="fp32", label_smoothing=0.0):
    """One step of each classifier, and of the backbone if it learns.

    Args:
        network: Classifiers, or DistributedDataParallel around them.
        scaler: torch.amp.GradScaler, enabled for fp16 alone.
        labels: classes [B] or shares of them [B, K].
        rate: factor of the groups' "peak" that gives this step's learning rate.

    Returns:
        cross-entropies [G] of the classifiers before the step, nats, on the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    with autocast(images.device, precision):
        logits = network(images)
    losses = torch.stack([F.cross_entropy(x, labels, label_smoothing=label_smoothing) for x in logits])
    scaler.scale(losses.sum()).backward()  # each reaches its own classifier alone
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if len(losses) > 1:  # one that diverges begins again, and is not in the way of the others
        for p, state in optimizer.state.items():
            for tensor in (p.data, *state.values()):
                tensor.nan_to_num_(0.0, 0.0, 0.0)
    return losses.detach()


# ---- all steps ----

LINE = "loss {loss:.3f}  lr {lr:.1e}  {images_per_second:.0f} img/s: {data_seconds:.3f} s data + " \
       "{compute_seconds:.3f} s compute"


def train_classifiers(network, optimizer, pictures, fixed, measure, output, args, size, device, rank=0, world_size=1,
          warmup_epochs=0, mix=None, label_smoothing=0.0):
    """Train Classifiers on crops and flips to the end of a cosine, from the newest save in `output` on.

    Args:
        optimizer: with groups as from head_groups or layer_groups, their "peak" for 256 pictures a step.
        pictures: labelled, see data.py.
        fixed: {name: value} of what must be as it was for a saved state to be gone on with.
        measure: () -> {name: figure}, asked every args.val_freq epochs with the network in eval mode.
        output: Path of the folder for checkpoint.pth and log.jsonl.
        args: flags of evaluate.py.
        size: side of a view, pixels.
        mix: see `mixing`.

    Returns:
        False if a signal ended it before its end, after saving its state; then the same call goes on.

    Raises:
        DataError: fewer pictures than a step takes.
        FloatingPointError: the loss is no number any more.
    """
    global_batch = args.batch_size_per_gpu * world_size
    steps_per_epoch = len(pictures) // global_batch
    total_steps = args.epochs * steps_per_epoch
    if steps_per_epoch == 0:
        raise DataError(f"{len(pictures)} labelled pictures are fewer than the {global_batch} of one step "
                        f"(batch_size_per_gpu x processes); lower --batch_size_per_gpu")

    # ---- a new run, or the rest of one ----
    report, path = Logger(output / "log.jsonl", silent=rank != 0), output / "checkpoint.pth"
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16" and not network.frozen)
    objects = dict(network=network.heads if network.frozen else network, optimizer=optimizer, scaler=scaler)
    progress = dict(step=0, log_bytes=0, unreadable=[])
    flags = dict(precision=args.precision)
    fixed = fixed | {"epochs": args.epochs, "seed": args.seed, "crop_scale": list(args.crop_scale), "image_size": size,
                     "number of pictures": len(pictures), "global batch": global_batch}
    found = None
    if args.resume == "auto" or was_restarted():
        found = resume_run(path, fixed, flags, objects, progress, say=report.say)
    first_step = progress["step"]
    distributed.check_same_on_all_ranks("a run at step", first_step)
    if rank == 0:
        report.claim = prepare_output_dir(output, found, args.overwrite, "classification")
    report.take_up(progress)
    if found:
        report.say(f"going on at step {first_step} of {total_steps} from {found}")

    def save(step):
        if rank == 0:
            progress.update(step=step, unreadable=sorted(report.unreadable), log_bytes=report.log_bytes())
            states = {name: thing.state_dict() for name, thing in objects.items()}
            save_checkpoint(path, fixed=fixed, flags=flags, progress=progress, **states)

    # ---- training ----
    set_matmul_precision(device, args.precision, network.tokens.backbone.embed_dim)
    network.train()
    model = network
    if device.type == "cuda" and world_size > 1 and not network.frozen:
        convert_sync_batchnorm(network.tokens)
    if world_size > 1:
        model = nn.parallel.DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    multicrop = (BatchMultiCrop if device.type == "cuda" else MultiCrop)(
        size, args.crop_scale, global_number=1, local_number=0, jitter=0, grayscale=0, blur=(0, 0, 0), solarize=0)
    keys = iter_batch_keys(first_step, total_steps, len(pictures), args.seed, args.batch_size_per_gpu, 1, rank, world_size)
    loader = build_train_loader(pictures, multicrop, keys, args.seed, args.num_workers, pin_memory=device.type == "cuda")
    batches, stop, saved_at = iter_on_device(loader, multicrop, device), distributed.StopSignals(), time.monotonic()
    report.start_bar(first_step * global_batch, total_steps * global_batch, "img")
    report.restart_pace()
    for step in range(first_step, total_steps):
        epoch, end_of_epoch = step // steps_per_epoch, (step + 1) % steps_per_epoch == 0
        done = step + 1 == total_steps
        (images,), labels, unreadable = report.wait_for(batches)
        report.skipped(unreadable)
        torch.manual_seed(derive_seed("drop path", args.seed, step, rank))  # mixing draws after it too
        if mix:
            images, labels = mix(images, labels)
        rate = cosine_schedule(step, total_steps, 1.0, 0.0, warmup_epochs * steps_per_epoch)
        losses = supervised_step(model, optimizer, scaler, images, labels, rate * global_batch / 256, args.precision,
                            label_smoothing)
        report.next_step(global_batch)
        stopped_by = stop.poll()[0]
        if end_of_epoch or (step + 1) % args.log_every == 0:
            if world_size > 1:
                dist.all_reduce(losses)
            report.unreadable = set().union(*distributed.all_gather_objects(report.unreadable))
            if not losses.isfinite().any():
                raise FloatingPointError(f"step {step}: in {args.precision} the loss is not finite; lower --lr"
                                         + " or name --precision fp32" * (args.precision != "fp32"))
            report.step(dict(epoch=epoch, step=step, loss=losses.nan_to_num(math.inf).min().item() / world_size,
                             lr=max(group["lr"] for group in optimizer.param_groups), **report.pace(global_batch),
                             unreadable=len(report.unreadable)), total_steps, LINE)
        if end_of_epoch and not done and args.val_freq and (epoch + 1) % args.val_freq == 0:
            broadcast_buffers(network.eval())
            figures = measure()
            network.train()
            report.log(dict(epoch=epoch) | figures)
            report.say(f"epoch {epoch}: " + ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
            report.restart_pace()
        if done or stopped_by or time.monotonic() - saved_at > 60 * args.save_every_minutes:
            save(step + 1)
            saved_at = time.monotonic()
        if stopped_by and not done:
            stop.restore()
            report.stopped(stopped_by, step + 1, total_steps, path, args.resume)
            return False
    stop.restore()
    report.close()
    broadcast_buffers(network.eval())
    return True
