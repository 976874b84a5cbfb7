"""Supervised training: linear classifiers on a frozen backbone, or fine-tuning with one classifier.

    network = Classifiers(FeatureExtractor(backbone, n_last_blocks=4), num_classes=1000, count=3)          # frozen
    optimizer = build_optimizer("sgd", build_head_groups(network, [(0.001, 0.0), (0.01, 0.0), (0.1, 0.0)]))

    network = Classifiers(FeatureExtractor(backbone), num_classes=10, frozen=False)                         # fine-tuned
    optimizer = build_optimizer("adamw", build_layer_decay_groups(network, 0.0005, weight_decay=0.05, layer_decay=0.75))

    losses = supervised_step(network, optimizer, scaler, images, labels, lr_factor=0.5)                     # one step
    completed = train_classifiers(network, optimizer, images, crops, fixed, evaluate, output, args)         # all steps

Caron et al. 2021, section 4: linear classification and fine-tuning. Interrupted training resumes, as in train.py.
"""

import contextlib
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from augment import BatchMultiCrop, MultiCrop
from backbones import broadcast_buffers, convert_sync_batchnorm
from common.checkpoint import CheckpointError, Run
from common.cli import image_side
from common.distributed import StopRequested, StopSignals, all_gather_objects, get_rank, get_world_size
from common.logger import Logger
from common.precision import autocast
from common.weights import check_image_size, load_backbone, read_input, read_weights
from data.datasets import DataError
from data.loaders import build_train_loader, iter_batch_keys, iter_on_device
from data.order import derive_seed
from dino_loss import cosine_schedule
from optim import build_param_groups, decay_layers

# ---- networks ----

class FeatureExtractor(nn.Module):
    """Input of a linear classifier: CLS tokens of the last blocks, optionally with the mean patch token.

    Args:
        n_last_blocks: 4 for ViT-S, 1 for ViT-B and for other backbones, which have one feature; 0: no CLS tokens.
        avgpool: append the mean of the last block's patch tokens, as for ViT-B.

    Raises:
        CheckpointError: more blocks than the backbone has, or no patch tokens.
    """

    def __init__(self, backbone, n_last_blocks=1, avgpool=False):
        super().__init__()
        most = max(1, len(backbone.blocks))
        if not 1 - avgpool <= n_last_blocks <= most:
            raise CheckpointError(f"--n_last_blocks {n_last_blocks} is not from 1 to {most}, the model's depth")
        if avgpool and not backbone.blocks:
            raise CheckpointError(f"{backbone.arch} has no patch tokens, leave --avgpool_patchtokens out")
        self.backbone, self.n_last_blocks, self.avgpool = backbone, n_last_blocks, avgpool
        self.dim = backbone.embed_dim * (self.n_last_blocks + avgpool)

    def forward(self, x):  # [B, C, H, W] -> [B, dim]
        if self.n_last_blocks == 1 and not self.avgpool:
            return self.backbone(x)  # equal, and with stochastic depth
        tokens = self.backbone.get_intermediate_layers(x, max(1, self.n_last_blocks))
        patches = [tokens[-1][:, 1:].mean(dim=1)] if self.avgpool else []
        return torch.cat([t[:, 0] for t in tokens][:self.n_last_blocks] + patches, dim=1)


class Classifiers(nn.Module):
    """G linear classifiers on the same features: images [B, C, H, W] -> logits [G, B, K].

    Args:
        extractor: FeatureExtractor of a backbone.
        num_classes: K.
        count: G.
        frozen: whether the backbone gets no gradient and stays in eval mode.
        build_head: (dim, K) -> classifier with a weight and a bias; of a SegmentationHead, logits are [G, B, K, h, w].
    """

    def __init__(self, extractor, num_classes, count=1, frozen=True, build_head=nn.Linear):
        super().__init__()
        self.tokens, self.frozen = extractor.requires_grad_(not frozen), frozen  # "tokens" is in checkpoints
        self.heads = nn.ModuleList(build_head(extractor.dim, num_classes) for _ in range(count))
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, x):
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            features = self.tokens(x)
        with torch.autocast(x.device.type, enabled=False):
            return torch.stack([head(features.float()) for head in self.heads])

    def train(self, mode=True):
        super().train(mode)
        self.tokens.train(mode and not self.frozen)
        return self


def load_classifier(path):
    """Load classifier.safetensors of evaluate.py, or the one in a folder: Classifiers in eval mode, on the CPU.

    Returns:
        the network with one head, and the description in the file: "classes", "image_size", ...

    Raises:
        CheckpointError: no such file, or not a classifier and its backbone.
    """
    path = os.path.join(path, "classifier.safetensors") if os.path.isdir(path) else str(path)
    weights, info, _ = read_weights(path, None)
    if not {"classes", "image_size"} <= info.keys() or "classifier.weight" not in weights:
        raise CheckpointError(f"{path}: not classifier.safetensors of evaluate.py linear, logistic or finetune")
    if "classifier.norm.weight" in weights:
        raise CheckpointError(f"{path}: classifies patches, here images are; see SegmentationHead")
    if not any(name.startswith("backbone.") for name in weights):
        raise CheckpointError(f"{path}: holds no backbone, as those of earlier versions: run evaluate.py linear again")
    backbone, info = load_backbone(path, log=lambda text: None)
    try:
        extractor = FeatureExtractor(backbone, info.get("n_last_blocks", 1), info.get("avgpool_patchtokens", False))
        info |= dict(classes=[str(name) for name in info["classes"]], image_size=image_side(info["image_size"]))
        network = Classifiers(extractor, len(info["classes"]))
        network.heads[0].load_state_dict({name: weights[f"classifier.{name}"] for name in ("weight", "bias")})
        check_image_size(backbone, info["image_size"])
        info |= read_input(info, backbone.in_chans, path)
    except Exception as error:  # the description may hold anything
        raise CheckpointError(f"{path}: not a classifier for its backbone and classes: {error}") from None
    return network.eval(), info


# ---- optimization ----

def build_head_groups(network, grid):
    """Parameter groups of frozen-backbone classifiers: one (lr, weight_decay) of the grid per classifier."""
    return [{"params": list(head.named_parameters()), "peak": lr, "weight_decay": weight_decay}
            for head, (lr, weight_decay) in zip(network.heads, grid)]


def build_layer_decay_groups(network, lr, weight_decay, layer_decay):
    """Parameter groups for fine-tuning: the classifier has `lr`, the backbone less, see `optim.decay_layers`."""
    groups = build_param_groups(network, decay_layers(network.tokens.backbone, layer_decay))
    return [{"weight_decay": weight_decay} | group | {"peak": lr * group["lr_scale"]} for group in groups]


def build_mixup(num_classes, mixup, cutmix):
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019): (images, labels) -> images, soft labels [B, K].

    Args:
        mixup, cutmix: alpha of each, 0 disables it. If both are on, each batch takes one at random.

    Returns:
        a transform, None if both are off.
    """
    kinds = [kind(alpha=alpha, num_classes=num_classes)
             for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    return v2.RandomChoice(kinds) if kinds else None


def supervised_step(network, optimizer, scaler, images, labels, lr_factor=1.0, precision="fp32", label_smoothing=0.0,
                    criterion=F.cross_entropy):
    """One gradient step of each classifier, and of the backbone unless it is frozen.

    Args:
        network: Classifiers, or DistributedDataParallel around them.
        scaler: torch.amp.GradScaler, enabled for fp16 only.
        labels: class indices [B], soft labels [B, K], or what else the criterion takes.
        lr_factor: the learning rate of each group is its "peak" times this.
        criterion: (logits of one classifier, labels, label_smoothing=...) -> loss.

    Returns:
        cross-entropies [G] of the classifiers before the step, in nats, on the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * lr_factor
    with autocast(images.device, precision):
        logits = network(images)
    losses = torch.stack([criterion(x, labels, label_smoothing=label_smoothing) for x in logits])
    scaler.scale(losses.sum()).backward()  # each term has gradients for its own classifier only
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if len(losses) > 1:  # a classifier that diverges must not stop the others: it restarts from zero
        for p, state in optimizer.state.items():
            for tensor in (p.data, *state.values()):
                tensor.nan_to_num_(0.0, 0.0, 0.0)
    return losses.detach()


# ---- all steps ----

def build_crops(args, info, device):
    """One random crop of an image, flipped at random, as a transform; batched on CUDA.

    Args:
        args: image_size, the side of a crop in pixels, and crop_scale.
        info: "channels", "mean" and "std" of the images, see `read_input`.
    """
    return (BatchMultiCrop if device.type == "cuda" else MultiCrop)(
        args.image_size, args.crop_scale, global_number=1, local_number=0, jitter=0, grayscale=0, blur=(0, 0, 0),
        **{name: info[name] for name in ("channels", "mean", "std")})


def train_classifiers(network, optimizer, images, crops, fixed, evaluate, output, args, criterion=F.cross_entropy):
    """Train Classifiers on random crops with a cosine schedule, resuming from the newest checkpoint.

    Args:
        optimizer: with groups of build_head_groups or build_layer_decay_groups, their "peak" for a batch size of 256.
        images: labeled, see data/datasets.py.
        crops: transform of `build_crops`, or one that returns a crop and its labels, as SemanticCrop.
        fixed: {name: value} that a resumed run must share.
        evaluate: () -> {name: metric}, called every args.val_freq epochs with the network in eval mode.
        output: Path of the folder for checkpoint.pth and log.jsonl.
        args: flags of evaluate.py; image_size, the side of a crop in pixels, must be set.
        criterion: see `supervised_step`.

    Returns:
        False if a signal stopped the run, which is then saved; the same call resumes it.

    Raises:
        DataError: fewer images than the global batch size.
        FloatingPointError: the loss is not finite.
    """
    rank, world_size, device = get_rank(), get_world_size(), network.heads[0].weight.device
    global_batch_size = args.batch_size_per_gpu * world_size
    steps_per_epoch = len(images) // global_batch_size
    total_steps = args.epochs * steps_per_epoch
    if steps_per_epoch == 0:
        raise DataError(f"{len(images)} labeled images are fewer than the global batch size {global_batch_size} "
                        f"(batch_size_per_gpu x GPUs), lower --batch_size_per_gpu")
    logger = Logger(output / "log.jsonl", is_silent=rank != 0, device=device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16" and not network.frozen)
    objects = dict(network=network.heads if network.frozen else network, optimizer=optimizer, scaler=scaler)
    fixed = fixed | dict(epochs=args.epochs, seed=args.seed, crop_scale=list(args.crop_scale), num_images=len(images),
                         global_batch_size=global_batch_size, image_size=args.image_size, shuffle="full")
    run = Run(output, "classification", objects, fixed, dict(precision=args.precision), {}, logger)
    first_step = run.start(args, total_steps)

    model = network.train()
    if device.type == "cuda" and world_size > 1 and not network.frozen:
        convert_sync_batchnorm(network.tokens)
    if world_size > 1:
        model = nn.parallel.DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    mixup = build_mixup(len(network.heads[0].weight), args.mixup, args.cutmix)
    keys = iter_batch_keys(first_step, total_steps, len(images), args.seed, args.batch_size_per_gpu, rank=rank,
                           world_size=world_size, shuffle=run.fixed["shuffle"])
    loader = build_train_loader(images, crops, keys, args.seed, args.num_workers, pin_memory=device.type == "cuda")
    batches, signals = iter_on_device(loader, crops, device), StopSignals()
    logger.start_progress(first_step, total_steps)
    completed = first_step
    try:
        for step in range(first_step, total_steps):
            epoch, is_epoch_end = step // steps_per_epoch, (step + 1) % steps_per_epoch == 0
            is_last = step + 1 == total_steps
            ((views, *masks), labels, corrupt), is_save_step = signals.wait(lambda: logger.next_batch(batches),
                                                                            run.is_save_due(args.save_every_minutes))
            logger.log_corrupt(corrupt)
            torch.manual_seed(derive_seed("drop path", args.seed, step, rank))  # here, because mixup consumes it too
            labels = masks[0] if masks else labels
            if mixup:
                views, labels = mixup(views, labels)
            rate = cosine_schedule(step, total_steps, 1.0, 0.0, args.warmup_epochs * steps_per_epoch)

            losses = supervised_step(model, optimizer, scaler, views, labels, rate * global_batch_size / 256,
                                     args.precision, args.label_smoothing, criterion)

            completed = step + 1
            logger.count_step()
            if is_epoch_end or (step + 1) % args.log_every == 0:
                if world_size > 1:
                    dist.all_reduce(losses)
                logger.corrupt_images = set().union(*all_gather_objects(logger.corrupt_images))
                if not losses.isfinite().any():
                    raise FloatingPointError(f"step {step}: the loss is not finite in {args.precision}, lower --lr or "
                                             f"use --precision fp32")
                loss = losses.nan_to_num(torch.inf).min().item() / world_size
                logger.log_step(dict(epoch=epoch, step=step, loss=loss,
                                     lr=max(group["lr"] for group in optimizer.param_groups),
                                     **logger.throughput(global_batch_size, total_steps - step - 1),
                                     corrupt_images=len(logger.corrupt_images)),
                                args.epochs, ["loss {loss:.3f}", "lr {lr:.1e}"])
            if is_epoch_end and not is_last and args.val_freq and (epoch + 1) % args.val_freq == 0:
                broadcast_buffers(network.eval())
                metrics = evaluate()
                network.train()
                logger.log(dict(epoch=epoch) | metrics)
                words = (f"{name.replace('_', ' ').replace('top1', 'top-1').replace('miou', 'mIoU')} "
                         f"{metrics[name]:.2f}%" for name in metrics)
                logger.print(f"epoch {epoch}: {', '.join(words)}")
                logger.reset_timer()
            if is_last or is_save_step:
                run.save(completed)
    except StopRequested as stop:
        run.save(completed)
        run.print_stopped(stop, completed, total_steps, args)
        return False
    signals.restore()
    logger.close()
    broadcast_buffers(network.eval())
    return True
