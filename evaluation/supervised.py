"""Supervised training: linear classifiers on a frozen backbone, or fine-tuning with one classifier.

    network = Classifiers(FeatureExtractor(backbone, n_last_blocks=4), num_classes=1000, count=3)          # frozen
    optimizer = build_optimizer("sgd", build_head_groups(network, [(0.001, 0.0), (0.01, 0.0), (0.1, 0.0)]))

    network = Classifiers(FeatureExtractor(backbone), num_classes=10, frozen=False)                         # fine-tuned
    optimizer = build_optimizer("adamw", build_layer_decay_groups(network, 0.0005, weight_decay=0.05, layer_decay=0.75))

    losses = supervised_step(network, optimizer, scaler, images, labels, lr_factor=0.5)                     # one step
    num_corrupt = train_classifiers(network, optimizer, images, crops, fixed, evaluate, output, args)       # all steps
    train_and_test(network, optimizer, grid, hparams, setup, crops, report, measure)                        # and result

Caron et al. 2021, section 4: linear classification and fine-tuning. Interrupted training resumes, as in train.py.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset
from torchvision.transforms import v2

from augment import BatchMultiCrop, MultiCrop
from backbones import broadcast_buffers, convert_sync_batchnorm
from common.checkpoint import MODEL_FILES, CheckpointError, Run
from common.distributed import StopRequested, StopSignals, get_rank, get_world_size, is_rank_zero
from common.files import create_folder
from common.logger import Logger, log, progress_bar
from common.precision import autocast
from data.datasets import DataError
from data.loaders import build_train_loader, iter_batch_keys, iter_on_device
from data.order import derive_seed
from dino_loss import cosine_schedule
from evaluation.classifiers import get_fixed_settings, restore_classifier, save_classifier
from evaluation.linear import fit_best_classifier, holdout_mask
from evaluation.report import report_accuracy
from optim import build_param_groups, decay_layers

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
        Number of corrupt images that were skipped; None if a signal stopped the run, which is then saved: the same call
        resumes it.

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
    run = Run(output, "classification", objects, fixed, dict(precision=args.precision), dict(evaluated=0), logger)
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
        finish_epoch(first_step, steps_per_epoch, network, evaluate, run, args)
        for step in range(first_step, total_steps):
            epoch, is_epoch_end = step // steps_per_epoch, (step + 1) % steps_per_epoch == 0
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
                logger.gather_corrupt()
                if not losses.isfinite().any():
                    raise FloatingPointError(f"step {step}: the loss is not finite in {args.precision}, lower --lr or "
                                             f"use --precision fp32")
                loss = losses.nan_to_num(torch.inf).min().item() / world_size
                logger.log_step(dict(epoch=epoch, step=step, loss=loss,
                                     lr=max(group["lr"] for group in optimizer.param_groups),
                                     **logger.throughput(global_batch_size, total_steps - step - 1),
                                     corrupt_images=len(logger.corrupt_images)),
                                args.epochs, ["loss {loss:.3f}", "lr {lr:.1e}"])
            finish_epoch(completed, steps_per_epoch, network, evaluate, run, args)
            if is_epoch_end or is_save_step:
                run.save(completed)
    except StopRequested as stop:
        run.save(completed)
        run.print_stopped(stop, completed, total_steps, args)
        return None
    signals.restore()
    logger.close()
    broadcast_buffers(network.eval())
    return len(logger.corrupt_images)


def finish_epoch(step, steps_per_epoch, network, evaluate, run, args):
    """At an epoch boundary but the last, evaluate where due, unless an earlier process did."""
    epoch, step_in_epoch = divmod(step, steps_per_epoch)
    is_due = not step_in_epoch and args.val_freq and epoch % args.val_freq == 0 and epoch < args.epochs
    if not is_due or epoch <= run.progress["evaluated"]:
        return
    broadcast_buffers(network.eval())
    metrics = evaluate()
    network.train()
    run.progress["evaluated"] = epoch
    run.logger.log(dict(epoch=epoch - 1) | metrics)
    words = (f"{name.replace('_', ' ').replace('top1', 'top-1').replace('miou', 'mIoU')} {metrics[name]:.2f}%"
             for name in metrics)
    run.logger.print(f"epoch {epoch - 1}: {', '.join(words)}")
    run.logger.reset_timer()


# ---- training and testing ----

def train_and_test(network, optimizer, grid, hparams, setup, crops, report, measure, metric="test_top1",
                   criterion=F.cross_entropy):
    """Train Classifiers on random crops, or with --test_only load a trained one; test the best and write the result.

    Args:
        grid: (lr, weight decay) of each classifier; of several, the best on a held-out tenth of the images is kept.
        hparams: {name: value} that a resumed run must share, written with the result.
        crops, criterion: see `train_classifiers`.
        report: (network, setup, hyperparameters), tests the classifier and writes the result.
        measure: (network, images, setup) -> metric of each classifier, in percent.
        metric: its name in the log.
    """
    args = setup.args
    if args.test_only:
        hparams = restore_classifier(network, setup)
    else:
        train_images, val_images = setup.data.train_labeled, setup.data.val
        if len(grid) > 1:
            mask, metric = holdout_mask(len(train_images)), "held_out_top1"
            train_images, val_images = (Subset(train_images, m.nonzero().flatten().numpy()) for m in (~mask, mask))
        if not len(train_images):
            raise DataError(f"{setup.data.path}: too few labeled images to train and to hold out a part, at least 2 "
                            f"are needed")
        if 0 < (largest := len(train_images) // get_world_size()) < args.batch_size_per_gpu:
            log(f"NOTE: --batch_size_per_gpu {largest} for {args.batch_size_per_gpu}, as there are {len(train_images)} "
                f"training images")
            args.batch_size_per_gpu = largest
        log_grid(network, grid, args.batch_size_per_gpu * get_world_size())
        num_corrupt = train_classifiers(
            network, optimizer, train_images, crops, get_fixed_settings(setup) | hparams | {"grid": grid},
            lambda: {metric: max(measure(network, val_images, setup))}, setup.output, args, criterion)
        if num_corrupt is None:  # stopped by a signal
            return
        accuracies = measure(network, val_images, setup) if len(grid) > 1 else [0.0]
        best = accuracies.index(max(accuracies))
        network.heads = network.heads[best:best + 1]
        hparams |= dict(seed=args.seed, precision=args.precision, crop_scale=list(args.crop_scale),
                        global_batch_size=args.batch_size_per_gpu * get_world_size(), corrupt_train_images=num_corrupt)
        hparams = save_classifier(network, grid, best, accuracies, hparams, setup)
    report(network, setup, hparams)


def train_on_features(network, fit, grid, names, hparams, setup):
    """Train and test on features that are extracted once; heads[0] becomes the best classifier of the grid.

    Args:
        fit: (features, labels) -> linear layer, index of its hyperparameters in the grid, held-out accuracy of each.
        grid, names: hyperparameters of each classifier, and their names.
        hparams: {name: value}, written with the result.
    """
    for name in ("checkpoint.pth", *MODEL_FILES["pretraining"]):
        if (setup.output / name).exists():
            raise CheckpointError(f"{setup.output} holds {name} of a training run: choose another --output_dir")
    if is_rank_zero():
        create_folder(setup.output)
    features = setup.load_or_extract_features(network.tokens)
    x, y, test_x = (features[name].to(setup.device) for name in ("train_features", "train_labels", "test_features"))
    if len(x) < 2:
        raise DataError(f"{setup.data.path}: one labeled image is too few to hold out a part, add images")
    network.heads[0], best, accuracies = fit(x, y)
    hparams = save_classifier(network, grid, best, accuracies, hparams, setup, names)
    report_accuracy(network.heads[0](test_x).cpu(), features["test_labels"], setup, hparams)


def fit_quick(network, grid, x, y, args):
    """The best linear classifier of a grid, for `train_on_features`."""
    log_grid(network, grid, min(1024, len(x)))
    with progress_bar(total=2 * args.epochs * len(x), unit="img") as bar:
        classifier, best, accuracies = fit_best_classifier(x, y, network.heads[0].out_features, grid,
                                                           epochs=args.epochs, seed=args.seed, progress=bar.update)
    if not classifier.weight.isfinite().all():
        raise FloatingPointError("every classifier of the grid diverged: lower --lr")
    return classifier.to_linear(), best, accuracies


def log_grid(network, grid, batch_size):
    lrs = ", ".join(f"{lr * batch_size / 256:.3g}" for lr in sorted({lr for lr, _ in grid}))
    log(f"{len(grid)} linear classifier{'s' * (len(grid) > 1)} on {network.tokens.dim} features; effective lr {lrs} "
        f"= lr * {batch_size} / 256 (linear scaling rule)")
