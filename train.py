"""Train a vision transformer without labels.

    python train.py @recipes/demo.txt                                   # a few minutes on a laptop, no data needed
    python train.py --arch vit_small --data_path /data/imagenet         # one device
    torchrun --nproc_per_node=8 train.py @recipes/imagenet_vits16.txt --data_path /data/imagenet
    torchrun --nproc_per_node=8 train.py @recipes/imagenet_resnet50.txt --data_path /data/imagenet

Leaves in --output_dir: teacher.safetensors and student.safetensors (see checkpoint.py), teacher_best.safetensors
(the best k-NN so far, where there are labels), checkpoint.pth (to go on from; checkpoint.pth.1 is the one before),
log.jsonl, flags.txt. After any interruption the same command goes on from the last save, as if there had been
none. Healthy training starts at loss = ln(out_dim), stays there for the first hundreds of steps, and then falls
while the KL divergence stays above zero (not so with --loss mse).
"""

import json
import math
import shlex
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from advice import advice, usual_side
from augment import IMAGENET_MEAN, IMAGENET_STD
from backbones import BackboneError, broadcast_buffers, check_arch, convert_sync_batchnorm
from common import cli, distributed
from common.checkpoint import (
    CheckpointError,
    atomic_write,
    prepare_output_dir,
    resume_run,
    save_checkpoint,
    was_restarted,
)
from common.cli import (
    boolean,
    fraction,
    fraction_below_one,
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_int,
)
from common.logger import Logger
from common.precision import resolve_precision, set_matmul_precision
from common.weights import save_model
from data.datasets import DataError, open_data
from data.loaders import build_multicrop, build_train_loader, derive_seed, iter_batch_keys, iter_on_device
from dino_loss import DINOLoss, cosine_schedule, teacher_temp_schedule
from evaluation.online import detect_collapse, evaluate_online, pixel_features
from optim import build_optimizer, build_param_groups
from step import Settings, build_networks, compile_blocks, train_step
from vit import SIZES

TEACHERS = {  # (share of the teacher that a step keeps: the schedule's, at the end of an epoch) -> share
    "momentum": lambda scheduled, end_of_epoch: scheduled,
    "student": lambda scheduled, end_of_epoch: 0.0,
    "previous_step": lambda scheduled, end_of_epoch: 0.0,
    "previous_epoch": lambda scheduled, end_of_epoch: 0.0 if end_of_epoch else 1.0}

# ---- flags ----

def parse_args(argv=None):
    """Flags under the reference implementation's names, checked against each other."""
    parser = cli.build_parser("train.py", __doc__)

    def add(group, name, default, help, type=None, **kwargs):
        shown = "the arch's" if default is None else str(default).strip("()").replace(",", "")
        kwargs |= {} if "choices" in kwargs else {"metavar": "X"}
        group.add_argument(name, default=default, type=type, help=f"{help} (default: {shown})", **kwargs)

    model = parser.add_argument_group("model")
    add(model, "--arch", "vit_small", f"backbone: {', '.join(SIZES)}; a classifier of torchvision, as resnet50; "
        "timm:NAME, if timm is installed")
    add(model, "--patch_size", None, "of vit_*, pixels: 16, or 8 for better features at four times the cost", positive_int)
    add(model, "--embed_dim", None, "of vit_*, width", positive_int)
    add(model, "--depth", None, "of vit_*, number of blocks", positive_int)
    add(model, "--num_heads", None, "of vit_*, attention heads", positive_int)
    add(model, "--drop_path_rate", None, "stochastic depth of the student: 0.1 for vit_*, else 0", fraction_below_one)
    add(model, "--out_dim", 65536, "prototypes; 1024 to 4096 for some ten thousand pictures", positive_int)
    add(model, "--hidden_dim", 2048, "width of the projection head; less for narrow backbones", positive_int)
    add(model, "--norm_last_layer", True, "prototypes of length 1; false is better for vit_small, less stable", boolean)
    add(model, "--use_bn_in_head", False, "batch norm in the projection head", boolean)
    add(model, "--head_layers", 3, "layers of the projection head, before the prototypes", positive_int)
    add(model, "--bottleneck_dim", 256, "width of its output, which the prototypes are compared with", positive_int)
    add(model, "--l2_bottleneck", True, "that output is brought to length 1", boolean)
    add(model, "--predictor", False, "two layers more in the student's head alone", boolean)

    teacher = parser.add_argument_group("teacher")
    add(teacher, "--teacher", "momentum", "what it is: the student's running mean; the student itself; the student of "
        "the step before; the student at the end of the epoch before", choices=list(TEACHERS))
    add(teacher, "--momentum_teacher", 0.996, "of the running mean, rises to 1; 0.9995 for long runs of small steps, "
        "0.99 for short", fraction)
    add(teacher, "--warmup_teacher_temp", 0.04, "at the start; less if the loss stays at ln(out_dim)", positive_float)
    add(teacher, "--teacher_temp", 0.04, "temperature after its warm-up; above 0.07 is mostly unstable", positive_float)
    add(teacher, "--warmup_teacher_temp_epochs", 0, "epochs of linear warm-up; 30 in long runs", nonnegative_int)
    add(teacher, "--student_temp", 0.1, "temperature of the student", positive_float)
    add(teacher, "--loss", "ce", "cross-entropy, or mean squared error of centred directions, without temperatures",
        choices=["ce", "mse"])
    add(teacher, "--centering", "mean", "against one answer for all pictures: mean takes a running mean off the "
        "logits, batch and sinkhorn share the prototypes out among the pictures of a pass",
        choices=["mean", "batch", "sinkhorn"])
    add(teacher, "--center_momentum", 0.9, "share of that running mean that a step keeps; 1 for none", fraction)

    optim = parser.add_argument_group("optimisation")
    add(optim, "--epochs", 100, "passes over the pictures", positive_int)
    add(optim, "--batch_size_per_gpu", 64, "pictures per process and pass", positive_int)
    add(optim, "--accum_steps", 1, "passes whose gradients are summed into one step", positive_int)
    add(optim, "--optimizer", "adamw", "adamw for transformers", choices=["adamw", "sgd", "lars"])
    add(optim, "--lr", 0.0005, "peak, for 256 pictures a step; scaled linearly with their number", positive_float)
    add(optim, "--min_lr", 1e-6, "learning rate at the end", nonnegative_float)
    add(optim, "--warmup_epochs", 10, "epochs of linear learning-rate warm-up", nonnegative_int)
    add(optim, "--weight_decay", 0.04, "at the start; on matrices only", nonnegative_float)
    add(optim, "--weight_decay_end", 0.4, "at the end, by a cosine", nonnegative_float)
    add(optim, "--clip_grad", 3.0, "largest gradient norm, 0 for no clipping", nonnegative_float)
    add(optim, "--clip_mode", "per_parameter", "whose norm", choices=["per_parameter", "global"])
    add(optim, "--freeze_last_layer", 1, "epochs in which the prototypes rest; more if the loss stays", nonnegative_int)
    add(optim, "--precision", "auto", "auto: bf16 where the device is fast at it, else fp32",
        choices=["auto", "bf16", "fp16", "fp32"])

    cli.add_crop_flags(parser.add_argument_group("views"))

    run = parser.add_argument_group("run")
    add(run, "--data_path", "shapes", "folder of pictures, torchvision set as NAME:ROOT, or shapes[:SIZE]")
    add(run, "--output_dir", "runs/dino", "folder for everything the run writes")
    add(run, "--resume", "auto", "auto goes on with what output_dir holds, none starts anew (but also goes on when "
        "torchrun or Slurm has restarted it)", choices=["auto", "none"])
    run.add_argument("--overwrite", action="store_true", help="with --resume none: delete the run in output_dir first")
    add(run, "--save_every_minutes", 10.0, "between saves, besides those at the end of each epoch, 0 for none",
        nonnegative_float)
    add(run, "--save_every_steps", 0, "likewise, 0 for none", nonnegative_int)
    add(run, "--keep", 2, "saves kept to fall back to, the newest included", positive_int)
    add(run, "--saveckp_freq", 20, "epochs between numbered checkpoints, which stay, 0 for none", nonnegative_int)
    add(run, "--knn_every", 10, "epochs between k-NN tests where there are labels, 0 for none", nonnegative_int)
    add(run, "--knn_images", 20000, "at most so many labelled pictures to look neighbours up in", positive_int)
    add(run, "--linear_probe", False, "test by linear classifiers on the same features too, each time", boolean,
        nargs="?", const=True)
    add(run, "--log_every", 50, "steps between lines in the log", positive_int)
    add(run, "--seed", 0, "of weights, order, views and stochastic depth", cli.seed)
    add(run, "--compile", False, "compile the blocks: a minute or more at first, then faster steps", boolean, nargs="?",
        const=True)
    add(run, "--activation_checkpointing", False, "compute the student's blocks again in backward: slower, less memory",
        boolean, nargs="?", const=True)
    add(run, "--profile", 0, "steps to record, from the third on, in trace.json for Perfetto, 0 for none", nonnegative_int)
    add(run, "--timeout_minutes", 30.0, "how long a process waits for the others before it gives up", positive_float)
    cli.add_device_flags(run)

    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, list):
            setattr(args, name, tuple(value))
    resolve_arch(parser, args)
    cli.check_crop_flags(parser, args)
    if args.loss == "mse" and args.centering != "mean":
        parser.error(f"--centering {args.centering} makes probabilities, which --loss mse does not compare")
    if args.warmup_epochs > args.epochs:
        parser.error(f"--warmup_epochs {args.warmup_epochs} is more than --epochs {args.epochs}")
    if args.overwrite and args.resume != "none":
        parser.error("--overwrite deletes a run and starts anew: say --resume none as well")
    args.precision = resolve_precision(args.precision, args.device)
    if args.views == "auto":
        args.views = "device" if args.device == "cuda" else "cpu"
    return args


def resolve_arch(parser, args):
    """Fill in what --arch says of the backbone; end with a parser error if the flags of its sizes cannot be met."""
    of_vit = {"patch_size": 16} | SIZES.get(args.arch, SIZES["vit_small"])
    if args.drop_path_rate is None:
        args.drop_path_rate = 0.1 if args.arch in SIZES else 0.0
    if args.arch not in SIZES:
        try:
            check_arch(args.arch)
        except BackboneError as error:
            parser.error(f"--arch: {error}")
        for name in (*of_vit, "activation_checkpointing"):
            if getattr(args, name):
                parser.error(f"--{name} is of {', '.join(SIZES)}, not of {args.arch}")
        return
    for name, value in of_vit.items():
        setattr(args, name, getattr(args, name) or value)
    if args.embed_dim % args.num_heads:
        parser.error(f"--embed_dim {args.embed_dim} is not a multiple of --num_heads {args.num_heads}")
    for name in ["global_crops_size"] + ["local_crops_size"] * (args.local_crops_number > 0):
        if getattr(args, name) % args.patch_size:
            parser.error(f"--{name} {getattr(args, name)} is not a multiple of --patch_size {args.patch_size}")


# ---- what the flags mean ----

def settings_at(step, steps_per_epoch, global_batch, args):
    """The settings of a step, a pure function; args.lr is scaled to the number of pictures in a step."""
    total, epoch = args.epochs * steps_per_epoch, step // steps_per_epoch
    momentum = cosine_schedule(step, total, args.momentum_teacher, 1.0)
    return Settings(
        step=step,
        lr=cosine_schedule(step, total, args.lr * global_batch / 256, args.min_lr,
                           warmup_steps=args.warmup_epochs * steps_per_epoch),
        weight_decay=cosine_schedule(step, total, args.weight_decay, args.weight_decay_end),
        momentum=TEACHERS[args.teacher](momentum, (step + 1) % steps_per_epoch == 0),
        teacher_temp=teacher_temp_schedule(epoch, args.warmup_teacher_temp, args.teacher_temp,
                                           args.warmup_teacher_temp_epochs),
        frozen=epoch < args.freeze_last_layer,
        lagging=args.teacher == "previous_step")


def model_arguments(args):
    """The arguments of build_backbone, and those of DINOHead behind the first."""
    backbone = dict(img_size=args.global_crops_size)
    names = ("patch_size", "embed_dim", "depth", "num_heads") if args.arch in SIZES else ("arch",)
    head = dict(out_dim=args.out_dim, use_bn=args.use_bn_in_head, norm_last_layer=args.norm_last_layer,
                nlayers=args.head_layers, hidden_dim=args.hidden_dim, bottleneck_dim=args.bottleneck_dim,
                l2_bottleneck=args.l2_bottleneck)
    return backbone | {name: getattr(args, name) for name in names}, head


# ---- what it says and saves ----

LINE = ("loss {loss:.3f} (ln K {ln_k:.2f})  teacher entropy {teacher_entropy:.2f}  KL {kl:.3f}  lr {lr:.1e}  "
        "{images_per_second:.0f} img/s: {data_seconds:.3f} s data + {compute_seconds:.3f} s compute")


def save_run(output, keep, objects, info, **rest):
    """Everything needed to go on, and the two networks as files of their own."""
    states = {name: thing.state_dict() for name, thing in objects.items()}
    save_checkpoint(output / "checkpoint.pth", keep, **states, info=info, **rest)
    save_models(output, objects, info)


def save_models(output, objects, info):
    for name in ("student", "teacher"):
        save_model(output / f"{name}.safetensors", objects[name].state_dict(), info | {"network": name})


def is_sound(progress):
    """Whether what a file says of k-NN tests, epochs and unreadable pictures can be true."""
    scores = [*progress["knn"].values(), *progress["epoch_stats"]]
    return (all(type(text) is str for text in (*progress["knn"], *progress["unreadable"]))
            and all(len(accuracies) == 2 for accuracies in progress["knn"].values())
            and all(len(means) == 3 for means in progress["epoch_stats"])
            and all(type(score) is float for several in scores for score in several))


FIXED = ("arch", "patch_size", "embed_dim", "depth", "num_heads", "out_dim", "hidden_dim", "norm_last_layer",
         "use_bn_in_head", "head_layers", "bottleneck_dim", "l2_bottleneck", "predictor", "optimizer",
         "global_crops_size", "seed")  # that a run keeps
FREE = ("output_dir", "resume", "overwrite", "device", "num_workers", "timeout_minutes", "log_every", "keep",
        "save_every_minutes", "save_every_steps", "saveckp_freq", "knn_every", "knn_images", "linear_probe", "compile",
        "profile", "activation_checkpointing")  # that teach nothing


def write_pictures(path, step, pictures, images):
    """Write down the (epoch, index) keys of a step that failed, and the files where there are any."""
    files = getattr(images, "files", None)
    record = dict(step=step, pictures=[dict(epoch=epoch, index=index) | ({"file": files[index]} if files else {})
                                       for epoch, index in pictures])
    atomic_write(path, lambda temporary: Path(temporary).write_text(json.dumps(record, indent=1)))


def why_not_finite(output, step, precision):
    """The sentence that a run stops with."""
    what = "no scale keeps the gradient finite" if precision == "fp16" else "the gradient is not finite"
    way_on = {"fp16": "--precision bf16 or ", "bf16": "--precision fp32 or ", "fp32": ""}[precision] + "a lower --lr"
    return (f"step {step}: in {precision} {what}; the state without it is saved in {output / 'checkpoint.pth'}, its "
            f"pictures are named in {output / 'nonfinite.json'}; look at them, or go on with {way_on}")


def write_flags(path, args):
    """The resolved flags, in the form that @FILE reads, but for those that would delete the run they repeat."""
    flags = {name: value if isinstance(value, tuple) else [value] for name, value in vars(args).items()
             if name not in ("resume", "overwrite") and value is not None}
    lines = [shlex.join([f"--{name}", *map(str, values)]) for name, values in flags.items()]
    atomic_write(path, lambda temporary: Path(temporary).write_text("\n".join(lines) + "\n"))


def main(args):
    rank, world_size, device = distributed.init_distributed(args.device, args.timeout_minutes)
    output = Path(args.output_dir)
    report = Logger(output / "log.jsonl", silent=rank != 0)

    # ---- pictures ----
    data = distributed.run_on_rank_zero_first(lambda: open_data(args.data_path))
    distributed.check_same_on_all_ranks("pictures:", len(data.train))
    global_batch = args.batch_size_per_gpu * args.accum_steps * world_size
    steps_per_epoch = len(data.train) // global_batch
    total_steps = args.epochs * steps_per_epoch
    if steps_per_epoch == 0:
        raise DataError(f"{args.data_path}: {len(data.train)} pictures are fewer than the {global_batch} of one step "
                        f"(batch_size_per_gpu x accum_steps x processes); lower --batch_size_per_gpu")
    report.say(data.note)

    # ---- networks, loss, optimizer ----
    backbone, head = model_arguments(args)
    network, teacher = build_networks(backbone, head, args.drop_path_rate, args.seed, args.predictor)
    if "arch" in backbone:  # only a try tells which pictures it takes
        side = args.local_crops_size if args.local_crops_number else args.global_crops_size
        network.backbone.try_size(side, side)
    info = dict(arch=args.arch, backbone=backbone, head=head, patch_size=args.patch_size,
                image_size=args.global_crops_size, mean=IMAGENET_MEAN, std=IMAGENET_STD,
                data_path=data.path)  # what the model files say
    if device.type == "cuda" and world_size > 1:  # elsewhere each process has statistics of its own pictures
        network, teacher = map(convert_sync_batchnorm, (network, teacher))
    network, teacher = network.to(device), teacher.to(device)
    dino_loss = DINOLoss(args.out_dim, args.student_temp, args.center_momentum, args.centering, args.loss).to(device)
    optimizer = build_optimizer(args.optimizer, build_param_groups(network))
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    millions = sum(p.numel() for p in network.backbone.parameters()) / 1e6
    sizes = f"/{args.patch_size}: width {args.embed_dim}, {args.depth} blocks" if args.patch_size else \
        f": width {network.backbone.embed_dim}"
    report.say(f"{args.arch}{sizes}, {millions:.1f} M parameters; {args.out_dim} prototypes; {args.precision} on "
               f"{world_size} x {device.type}")
    report.say(f"{args.epochs} epochs of {steps_per_epoch} steps of {global_batch} pictures; effective lr "
               f"{args.lr * global_batch / 256:.3g} = {args.lr:g} * {global_batch} / 256 (linear scaling rule)")
    if rank == 0:  # who alone speaks; the others need not open pictures for it
        for sentence in advice(args, len(data.train), usual_side(data.train), total_steps):
            report.say(f"NOTE: {sentence}")

    # ---- a new run, or the rest of one ----
    objects = dict(student=network, teacher=teacher, dino_loss=dino_loss, optimizer=optimizer, scaler=scaler)
    progress = dict(step=0, knn={}, epoch_stats=[], unreadable=[], log_bytes=0)  # knn: name -> (top-1, top-5)
    fixed = {name: getattr(args, name) for name in FIXED}
    fixed |= {"global batch": global_batch, "number of pictures": len(data.train)}
    found = None
    if args.resume == "auto" or was_restarted():
        flags = {name: value for name, value in vars(args).items() if name not in FREE}
        found = resume_run(output / "checkpoint.pth", fixed, flags, objects, progress, is_sound, report.say)
    first_step, knn, epoch_stats = progress["step"], progress["knn"], progress["epoch_stats"]
    distributed.check_same_on_all_ranks("a run at step", first_step)
    if rank == 0:
        report.claim = prepare_output_dir(output, found, args.overwrite)  # held as long as the run
        write_flags(output / "flags.txt", args)
        if found:  # the models may be of another save than the state
            save_models(output, objects, info)
    report.take_up(progress)
    if found:
        report.say(f"going on at step {first_step} of {total_steps} from {found}" if first_step < total_steps else
                   f"{output} holds a complete run; to train anew, name another --output_dir")
    set_matmul_precision(args.device, args.precision, network.backbone.embed_dim)
    network.backbone.activation_checkpointing = args.activation_checkpointing
    if args.compile:
        compile_blocks(network, teacher)
    student = network
    if world_size > 1:
        student = nn.parallel.DistributedDataParallel(
            network, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    reached = torch.tensor(first_step, device=device)

    def save():
        if rank == 0:
            progress.update(step=reached.item(), unreadable=sorted(report.unreadable), log_bytes=report.log_bytes())
            save_run(output, args.keep, objects, info, progress=progress, fixed=fixed, flags=vars(args))

    # ---- between epochs ----
    judging = args.knn_every > 0 and data.val is not None

    def measure(name, model):
        best = max((top1 for other, (top1, _) in knn.items() if other.startswith("epoch")), default=-1.0)
        broadcast_buffers(teacher.eval())
        scores, unreadable = evaluate_online(model, data, args, rank, world_size)
        knn[name] = scores["top1"], scores["top5"]
        teacher.train()
        report.skipped(unreadable if rank == 0 else [])
        report.log(dict(knn=name) | scores)
        report.say("k-NN of {}: top-1 {:.1f}%, top-5 {:.1f}%".format(name, *knn[name])
                   + (f", linear classifier {scores['linear']:.1f}%" if "linear" in scores else ""))
        if rank == 0 and name.startswith("epoch") and knn[name][0] > best:
            save_model(output / "teacher_best.safetensors", teacher.state_dict(), info | {"network": "teacher"})

    def finish_epoch(step):
        """What is due between two epochs; after the save, so that an interruption does not lose the epoch."""
        epoch, place = divmod(step, steps_per_epoch)
        if place > 0:
            return
        numbered = output / f"checkpoint{epoch - 1:04}.pth"
        if rank == 0 and step and args.saveckp_freq and epoch % args.saveckp_freq == 0 and not numbered.exists():
            atomic_write(numbered, lambda temporary: shutil.copyfile(output / "checkpoint.pth", temporary))
        if judging and step == 0:
            measure("raw pixels", pixel_features)
            measure("untrained backbone", teacher.backbone)
        elif judging and (epoch % args.knn_every == 0 or step == total_steps) and f"epoch {epoch - 1}" not in knn:
            measure(f"epoch {epoch - 1}", teacher.backbone)
            save()

    stop = distributed.StopSignals()
    finish_epoch(first_step)

    # ---- training ----
    keys = (len(data.train), args.seed, args.batch_size_per_gpu, args.accum_steps)
    multicrop = build_multicrop(args, args.compile)
    loader = build_train_loader(data.train, multicrop, iter_batch_keys(first_step, total_steps, *keys, rank, world_size),
                          args.seed, args.num_workers, pin_memory=device.type == "cuda")
    batches = iter_on_device(loader, multicrop, device)
    report.start_bar(first_step, total_steps, "step")
    if args.profile and rank == 0:
        report.start_profiler(args.profile, output / "trace.json")
    saved_at, epoch_before = time.monotonic(), []
    report.restart_pace()
    for step in range(first_step, total_steps):
        epoch, end_of_epoch = step // steps_per_epoch, (step + 1) % steps_per_epoch == 0
        log_now = end_of_epoch or (step + 1) % args.log_every == 0
        now = settings_at(step, steps_per_epoch, global_batch, args)
        passes, _, unreadable = zip(*(report.wait_for(batches) for _ in range(args.accum_steps)))
        report.skipped(sum(unreadable, []))
        torch.manual_seed(derive_seed("drop path", args.seed, step, rank))  # after the loader, which draws too

        stats = train_step(student, teacher, dino_loss, optimizer, scaler, reached, passes, now, args.precision,
                           args.clip_grad, args.clip_mode == "per_parameter", diagnose=log_now)

        report.next_step()
        stopped_by = stop.poll()[0]
        if (log_now or stopped_by) and (reached.item() <= step or scaler.get_scale() < 1):
            failed = min(reached.item(), step)
            save()
            if rank == 0:
                pictures = [key for r in range(world_size)
                            for batch in iter_batch_keys(failed, failed + 1, *keys, r, world_size) for key in batch]
                write_pictures(output / "nonfinite.json", failed, pictures, data.train)
            distributed.all_gather_objects(None)  # the first process that ends with an error ends all
            raise FloatingPointError(why_not_finite(output, failed, args.precision))
        if log_now:
            if world_size > 1:
                dist.all_reduce(stats)
            loss, entropy, entropy_of_mean = (stats / world_size).tolist()
            report.unreadable = set().union(*distributed.all_gather_objects(report.unreadable))
            kl = loss - entropy if args.loss == "ce" else math.nan
            epoch_stats.append((entropy, entropy_of_mean, kl))
            report.step(dict(epoch=epoch, loss=loss, ln_k=math.log(args.out_dim), teacher_entropy=entropy,
                             teacher_entropy_of_mean=entropy_of_mean, kl=kl,
                             **report.pace(global_batch), unreadable=len(report.unreadable),
                             loss_scale=scaler.get_scale(), **now._asdict()), total_steps,
                        LINE if args.loss == "ce" else LINE.replace("  KL {kl:.3f}", ""))
        if end_of_epoch:
            trouble = detect_collapse(epoch_stats, args.out_dim, epoch_before)
            told_apart = args.batch_size_per_gpu >= 8  # else a mean output tells nothing of other pictures
            if trouble and told_apart and epoch >= max(args.warmup_epochs, args.freeze_last_layer):
                report.say(f"WARNING: {trouble}")
            epoch_before = epoch_stats.copy()
            epoch_stats.clear()
        if end_of_epoch or stopped_by or 0 < args.save_every_minutes * 60 < time.monotonic() - saved_at \
                or (args.save_every_steps and (step + 1) % args.save_every_steps == 0):
            save()
            if stopped_by:
                report.stopped(stopped_by, step + 1, total_steps, output / "checkpoint.pth", args.resume)
                return
            if end_of_epoch:
                finish_epoch(step + 1)
            report.restart_pace()
            saved_at = time.monotonic()
    report.close()

    if judging and knn:
        shown = dict.fromkeys([*list(knn)[:2], list(knn)[-1]])
        report.say("k-NN top-1 (k = 20): " + ", ".join(f"{name} {knn[name][0]:.1f}%" for name in shown))
        report.say(f"next: python evaluate.py knn --ckpt {output / 'teacher.safetensors'}"
                   + f" --data_path {args.data_path}" * (not args.data_path.startswith("shapes")))


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, BackboneError, CheckpointError, FloatingPointError)
