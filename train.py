"""Train a vision transformer without labels.

    python train.py @recipes/demo.txt                                   # a few minutes on a laptop, no data needed
    python train.py --arch vit_small --data_path /data/imagenet         # one device
    torchrun --nproc_per_node=8 train.py @recipes/imagenet_vits16.txt --data_path /data/imagenet

Leaves in --output_dir: teacher.safetensors and student.safetensors (see checkpoint.py), teacher_best.safetensors
(the best k-NN so far, where there are labels), checkpoint.pth (to go on from), log.jsonl, flags.txt. The same
command goes on after an interruption. Healthy training starts at loss = ln(out_dim), stays there for the
first hundreds of steps, and then falls while the KL divergence stays above zero.
"""

import argparse
import contextlib
import json
import math
import os
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from augment import IMAGENET_MEAN, IMAGENET_STD, MultiCrop
from checkpoint import CheckpointError, load_state, save_model, save_state
from data import DataError, Unreadable, eval_loader, open_data
from dino_loss import DINOHead, DINOLoss, cosine_schedule, teacher_temp_schedule
from knn import extract_features, knn_classifier
from vit import SIZES, VisionTransformer

# ---- flags ----


def parse_args(argv=None):
    """Flags under the reference implementation's names; @FILE reads more of them, one or several a line."""
    parser = argparse.ArgumentParser(
        prog="train.py", usage=argparse.SUPPRESS, description=__doc__, fromfile_prefix_chars="@",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.convert_arg_line_to_args = lambda line: line.partition("#")[0].split()

    def add(group, name, default, help, type=None, **kwargs):
        kwargs |= {} if "choices" in kwargs else {"metavar": "X"}
        group.add_argument(name, default=default, type=type or default.__class__, help=f"{help} (default: {default})",
                           **kwargs)

    model = parser.add_argument_group("model")
    add(model, "--arch", "vit_small", "size of the backbone", choices=list(SIZES))
    add(model, "--patch_size", 16, "pixels; 8 gives better features and costs four times as much", positive)
    add(model, "--embed_dim", None, "width, to depart from the arch's", positive)
    add(model, "--depth", None, "number of blocks, to depart from the arch's", positive)
    add(model, "--num_heads", None, "attention heads, to depart from the arch's", positive)
    add(model, "--drop_path_rate", 0.1, "stochastic depth of the student", share)
    add(model, "--out_dim", 65536, "prototypes; fewer for fewer pictures, 1024 to 4096 for some ten thousand", positive)
    add(model, "--norm_last_layer", True, "keep prototypes at length 1; false is better for vit_small, less stable", boolean)
    add(model, "--hidden_dim", 2048, "width of the projection head; less for narrow backbones, where it is most of the work",
        positive)
    add(model, "--use_bn_in_head", False, "batch norm in the projection head", boolean)

    teacher = parser.add_argument_group("teacher")
    add(teacher, "--momentum_teacher", 0.996, "rises to 1 over the run; higher for small batches, 0.9995 at 256", share)
    add(teacher, "--warmup_teacher_temp", 0.04, "temperature at the start; lower it if the loss stays at ln(out_dim)",
        positive_float)
    add(teacher, "--teacher_temp", 0.04, "temperature after its warm-up; above 0.07 is mostly unstable", positive_float)
    add(teacher, "--warmup_teacher_temp_epochs", 0, "epochs of linear warm-up, 30 for long runs", natural)

    optim = parser.add_argument_group("optimisation")
    add(optim, "--epochs", 100, "passes over the pictures", positive)
    add(optim, "--batch_size_per_gpu", 64, "pictures per process and pass", positive)
    add(optim, "--accum_steps", 1, "passes whose gradients are summed into one step", positive)
    add(optim, "--optimizer", "adamw", "adamw for transformers", choices=["adamw", "sgd", "lars"])
    add(optim, "--lr", 0.0005, "peak learning rate for 256 pictures a step; scaled linearly with the real number",
        positive_float)
    add(optim, "--min_lr", 1e-6, "learning rate at the end", non_negative_float)
    add(optim, "--warmup_epochs", 10, "epochs of linear learning-rate warm-up", natural)
    add(optim, "--weight_decay", 0.04, "at the start; on matrices only", non_negative_float)
    add(optim, "--weight_decay_end", 0.4, "at the end, by a cosine", non_negative_float)
    add(optim, "--clip_grad", 3.0, "largest gradient norm, 0 for no clipping", non_negative_float)
    add(optim, "--clip_mode", "per_parameter", "norm of each parameter on its own, or of all together",
        choices=["per_parameter", "global"])
    add(optim, "--freeze_last_layer", 1, "epochs without updates of the prototypes; more if the loss does not fall", natural)
    add(optim, "--precision", "auto", "auto takes bf16 where the device is built for it", choices=["auto", "bf16", "fp16",
                                                                                                 "fp32"])

    views = parser.add_argument_group("views")
    add(views, "--global_crops_size", 224, "pixels; the size of the pictures if they are small", positive)
    add(views, "--global_crops_scale", (0.4, 1.0), "share of the area; 0.14 1 without local crops", share, nargs=2)
    add(views, "--local_crops_number", 8, "0 for no multi-crop", natural)
    add(views, "--local_crops_size", 96, "pixels", positive)
    add(views, "--local_crops_scale", (0.05, 0.4), "share of the area", share, nargs=2)
    add(views, "--color_jitter", (0.4, 0.4, 0.2, 0.1), "brightness, contrast, saturation, hue", non_negative_float, nargs=4)
    add(views, "--blur", (1.0, 0.1, 0.5), "probability for first global, second global, local views", share, nargs=3)
    add(views, "--blur_radius", (0.1, 2.0), "pixels; less for small pictures", non_negative_float, nargs=2)

    run = parser.add_argument_group("run")
    add(run, "--data_path", "shapes", "folder of pictures, torchvision set as NAME:ROOT, or shapes[:SIZE]")
    add(run, "--output_dir", "runs/dino", "folder for everything the run writes")
    add(run, "--saveckp_freq", 20, "keep a numbered checkpoint every so many epochs, 0 for none", natural)
    add(run, "--knn_every", 10, "epochs between k-NN tests where there are labels, 0 for none", natural)
    add(run, "--knn_images", 20000, "at most so many labelled pictures to look neighbours up in", positive)
    add(run, "--log_every", 50, "steps between lines in the log", positive)
    add(run, "--seed", 0, "of weights, order, views and stochastic depth", natural)
    add(run, "--num_workers", min(10, usable_cores()), "processes that load pictures, per training process", natural)
    add(run, "--device", "auto", "cuda, mps or cpu", choices=["auto", "cuda", "mps", "cpu"])

    args = parser.parse_args(argv)
    size = SIZES[args.arch]
    args.embed_dim, args.depth, args.num_heads = (
        args.embed_dim or size["embed_dim"], args.depth or size["depth"], args.num_heads or size["num_heads"])
    crop_sizes = ["global_crops_size"] + ["local_crops_size"] * (args.local_crops_number > 0)
    for name in crop_sizes:
        if getattr(args, name) % args.patch_size:
            parser.error(f"--{name} {getattr(args, name)} is not a multiple of --patch_size {args.patch_size}")
    for name in ("global_crops_scale", "local_crops_scale", "blur_radius"):
        low, high = getattr(args, name)
        if low > high or (high == 0 and name != "blur_radius"):
            parser.error(f"--{name} {low} {high}: expected a range, lower end first")
    if args.embed_dim % args.num_heads:
        parser.error(f"--embed_dim {args.embed_dim} is not a multiple of --num_heads {args.num_heads}")
    if args.warmup_epochs > args.epochs:
        parser.error(f"--warmup_epochs {args.warmup_epochs} is more than --epochs {args.epochs}")
    if args.color_jitter[3] > 0.5:
        parser.error(f"--color_jitter: a hue of {args.color_jitter[3]} is more than half a turn, 0.5")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if args.device == "auto":
        args.device = next(name for name, there in available.items() if there)
    elif not available[args.device]:
        parser.error(f"--device {args.device}: torch finds none here")
    if args.precision == "auto":
        args.precision = "bf16" if has_fast_bf16(args.device) else "fp32"
    return args


def number(kind, allowed, words):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or not allowed(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
        return value
    return parse


positive = number(int, lambda x: x > 0, "a whole number above 0")
natural = number(int, lambda x: x >= 0, "a whole number, 0 or more")
positive_float = number(float, lambda x: x > 0, "a number above 0")
non_negative_float = number(float, lambda x: x >= 0, "a number, 0 or more")
share = number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def boolean(text):
    if text.lower() not in ("true", "false", "1", "0", "on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ("true", "1", "on")


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def has_fast_bf16(device):
    """Whether the device multiplies bfloat16 faster than float32."""
    if device == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


# ---- networks ----

class Network(nn.Module):
    """Backbone and projection head, for views of several sizes."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, views):
        """List of V tensors [B, C, s, s] -> logits [V*B, K], view-major; one backbone pass for each run of equal sizes."""
        runs = [[views[0]]]
        for view in views[1:]:
            if view.shape == runs[-1][0].shape:
                runs[-1].append(view)
            else:
                runs.append([view])
        return self.head(torch.cat([self.backbone(torch.cat(run)) for run in runs]))


def build_networks(args):
    """Student, teacher (its copy, without stochastic depth or gradients), and what the model files say of them."""
    torch.manual_seed(args.seed)
    vit = dict(img_size=args.global_crops_size, patch_size=args.patch_size, embed_dim=args.embed_dim, depth=args.depth,
               num_heads=args.num_heads)
    head = dict(in_dim=args.embed_dim, out_dim=args.out_dim, use_bn=args.use_bn_in_head,
                norm_last_layer=args.norm_last_layer, hidden_dim=args.hidden_dim)
    student = Network(VisionTransformer(**vit, drop_path_rate=args.drop_path_rate), DINOHead(**head))
    teacher = Network(VisionTransformer(**vit), DINOHead(**head))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    data_path = args.data_path if not os.path.exists(args.data_path) else os.path.abspath(args.data_path)
    info = dict(arch=args.arch, vit=vit, head=head, patch_size=args.patch_size, image_size=args.global_crops_size,
                mean=IMAGENET_MEAN, std=IMAGENET_STD, data_path=data_path)
    return student, teacher, info


@torch.no_grad()
def move_teacher(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student, for every parameter (section 3.1)."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


# ---- optimisation ----

def param_groups(network):
    """Two groups of named parameters: matrices, which are regularised, then biases and norms, which are not."""
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    regularized = [(name, p) for name, p in trained if p.ndim > 1]
    others = [(name, p) for name, p in trained if p.ndim <= 1]
    return [{"params": regularized}, {"params": others, "weight_decay": 0.0}]


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step on each matrix is scaled to the matrix's norm (You et al. 2017, algorithm 1)."""

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, trust=0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    scale = group["trust"] * p.norm() / update.norm()
                    update = update * torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                p.sub_(momentum.mul_(group["momentum"]).add_(update), alpha=group["lr"])


def build_optimizer(name, groups):
    """The optimizer by name; lr and weight decay are set before every step."""
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=groups[0]["params"][0][1].device.type != "mps")
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    return LARS(groups)


def clip_gradients(parameters, max_norm, per_parameter):
    """Scale gradients down to the given l2 norm, each on its own or all by one factor."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    scales = (max_norm / ((norms if per_parameter else norms.norm()) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, list(scales.expand(len(grads))))


class Settings(NamedTuple):
    """What the schedules say about one step."""

    lr: float
    weight_decay: float
    momentum: float  # of the teacher
    teacher_temp: float
    frozen: bool  # whether the prototypes rest


def settings_at(step, steps_per_epoch, global_batch, args):
    """The settings of a step, a pure function; args.lr is scaled to the number of pictures in a step."""
    total, epoch = args.epochs * steps_per_epoch, step // steps_per_epoch
    return Settings(
        lr=cosine_schedule(step, total, args.lr * global_batch / 256, args.min_lr,
                           warmup_steps=args.warmup_epochs * steps_per_epoch),
        weight_decay=cosine_schedule(step, total, args.weight_decay, args.weight_decay_end),
        momentum=cosine_schedule(step, total, args.momentum_teacher, 1.0),
        teacher_temp=teacher_temp_schedule(epoch, args.warmup_teacher_temp, args.teacher_temp,
                                           args.warmup_teacher_temp_epochs),
        frozen=epoch < args.freeze_last_layer)


def train_step(student, teacher, dino_loss, optimizer, scaler, batches, now, args, diagnose=False):
    """One step: both networks forward, loss, backward, clip, optimizer, teacher.

    Args:
        student: Network, or DistributedDataParallel around it.
        batches: one list of V view tensors [B, C, s, s] for each accumulated pass.
        now: Settings of this step.
        diagnose: also return the teacher's entropies, which cost a pass over its logits.

    Returns:
        dict of scalars still on the device, this process's part: `loss`, and by request `entropy` and
        `entropy_of_mean` of the teacher in nats.
    """
    network = getattr(student, "module", student)
    optimizer.param_groups[0]["weight_decay"] = now.weight_decay
    for group in optimizer.param_groups:
        group["lr"] = now.lr
    results = []
    for i, views in enumerate(batches):
        last = i == len(batches) - 1
        with student.no_sync() if student is not network and not last else contextlib.nullcontext():
            with autocast(views[0].device, args.precision):
                with torch.no_grad():
                    teacher_logits = teacher(views[:2])
                student_logits = student(views)
            stats = dino_loss.teacher_entropy(teacher_logits, now.teacher_temp) if diagnose else ()
            loss = dino_loss(student_logits, teacher_logits, now.teacher_temp, update_center=last)
            scaler.scale(loss / len(batches)).backward()
        results.append(torch.stack((loss.detach(), *stats)))
    if now.frozen:
        for p in network.head.last_layer.parameters():
            p.grad = None
    if args.clip_grad:
        scaler.unscale_(optimizer)
        clip_gradients(network.parameters(), args.clip_grad, args.clip_mode == "per_parameter")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    move_teacher(teacher, network, now.momentum)
    return dict(zip(("loss", "entropy", "entropy_of_mean"), torch.stack(results).mean(dim=0).unbind()))


def autocast(device, precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None)


# ---- data ----

def counted_seed(*key):
    """A seed that depends on the key alone."""
    return random.Random(repr(key)).getrandbits(63)


class Views(torch.utils.data.Dataset):
    """(epoch, index) -> the views of one picture, and messages about pictures that could not be read.

    An unreadable picture's place is taken by the next readable one, so that batches stay whole.
    """

    def __init__(self, images, multicrop, seed):
        self.images, self.multicrop, self.seed = images, multicrop, seed

    def __getitem__(self, key):
        epoch, index = key
        unreadable = []
        for i in range(index, index + len(self.images)):
            try:
                image, _ = self.images[i % len(self.images)]
            except Unreadable as error:
                unreadable.append(str(error))
                continue
            return self.multicrop(image, key=(self.seed, epoch, index)), unreadable
        raise DataError(f"none of the {len(self.images)} pictures can be read; the last: {unreadable[-1]}")


def collate(samples):
    """B samples of Views -> V tensors [B, 3, s, s], and all their messages."""
    views = [torch.stack(view) for view in zip(*(views for views, _ in samples))]
    return views, [message for _, unreadable in samples for message in unreadable]


def batch_keys(first_step, last_step, num_images, args, rank, world_size):
    """The (epoch, index) keys of every batch of this process, from first_step to before last_step.

    Each epoch is one permutation of the pictures, cut into steps, then processes, then accumulated
    passes: what a step sees does not depend on the number of processes.
    """
    per_step = args.batch_size_per_gpu * args.accum_steps * world_size
    steps_per_epoch = num_images // per_step
    order, order_epoch = None, None
    for step in range(first_step, last_step):
        epoch, place = divmod(step, steps_per_epoch)
        if epoch != order_epoch:
            generator = torch.Generator().manual_seed(counted_seed("order", args.seed, epoch))
            order, order_epoch = torch.randperm(num_images, generator=generator), epoch
        mine = order[place * per_step:(place + 1) * per_step].view(world_size, args.accum_steps, -1)[rank]
        for batch in mine.tolist():
            yield [(epoch, index) for index in batch]


def check_readable(images):
    """Fail early where no picture at all can be decoded."""
    for i in range(len(images)):
        try:
            return images[i]
        except Unreadable as error:
            last = error
    raise DataError(f"none of the {len(images)} pictures can be read; the last: {last}")


# ---- judging ----

class Judge:
    """k-NN top-1 and top-5 (k = 20) of a backbone on labelled pictures, the same ones each time."""

    def __init__(self, data, args, rank, world_size):
        queries = max(1, args.knn_images // 5)
        self.parts = [self.some(data.bank, args.knn_images), self.some(data.queries, queries)]
        self.args, self.rank, self.world_size = args, rank, world_size

    @staticmethod
    def some(images, most):
        if len(images) <= most:
            return images
        return torch.utils.data.Subset(images, sorted(random.Random(0).sample(range(len(images)), most)))

    def __call__(self, backbone):
        args = self.args
        features = []
        for images in self.parts:
            loader = eval_loader(images, args.global_crops_size, args.batch_size_per_gpu, args.num_workers, self.rank,
                                 self.world_size)
            with autocast(args.device, args.precision):
                features += extract_features(backbone, loader, args.device)[:2]
        return knn_classifier(*features, ks=(20,), device=args.device).popitem()[1]


def pixel_features(images):
    """The baseline that looks at nothing but pixels: [B, 3, H, W] -> [B, 3*32*32], averaged where larger."""
    return F.adaptive_avg_pool2d(images, 32).flatten(1)


def collapse(entropy, entropy_of_mean, kl, out_dim):
    """A sentence if these epoch means (nats) show that training has collapsed, else None (section 5.3, figure 7)."""
    top = math.log(out_dim)
    if entropy_of_mean < 0.05 * top:
        return (f"collapsed to one prototype: the teacher gives every image the same answer (entropy of its mean output "
                f"{entropy_of_mean:.3f} of ln K = {top:.2f}); try a higher --teacher_temp or a lower --lr")
    if entropy > 0.99 * top and kl < 0.01 * top:
        return (f"collapsed to uniform: the teacher answers nothing (entropy {entropy:.3f} of ln K = {top:.2f}), the loss "
                f"stays at ln K; try --warmup_teacher_temp 0.02 to 0.04, more --freeze_last_layer or a lower --lr")
    return None


# ---- the run ----

def start_processes(args):
    """Join the process group if torchrun started us: rank, number of processes, device."""
    if "RANK" not in os.environ:
        return 0, 1, torch.device(args.device)
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def write_flags(path, args):
    """The resolved flags, in the form that @FILE reads."""
    with open(path, "w") as file:
        for name, value in vars(args).items():
            file.write(f"--{name} {' '.join(map(str, value)) if isinstance(value, (tuple, list)) else value}\n")


def resume(path, args, objects):
    """Load a run's state into the objects it was saved from; returns the rest: step, k-NN results, flags."""
    state = load_state(path)
    try:
        for name in ("arch", "patch_size", "embed_dim", "depth", "num_heads", "out_dim", "optimizer", "global_crops_size"):
            if state["flags"][name] != getattr(args, name):
                raise CheckpointError(f"{path}: was trained with --{name} {state['flags'][name]}, not {getattr(args, name)}; "
                                      f"choose another --output_dir for another run")
        for name, thing in objects.items():
            thing.load_state_dict(state[name])
        return state["step"], state["knn"]
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not the checkpoint of such a run ({' '.join(str(error).split())[:200]})") from None


def main(args):
    rank, world_size, device = start_processes(args)
    output = Path(args.output_dir)
    say = tqdm.write if rank == 0 else lambda text: None

    # ---- pictures ----
    data = open_data(args.data_path)
    check_readable(data.train)
    global_batch = args.batch_size_per_gpu * args.accum_steps * world_size
    steps_per_epoch = len(data.train) // global_batch
    total_steps = args.epochs * steps_per_epoch
    if steps_per_epoch == 0:
        raise DataError(f"{args.data_path}: {len(data.train)} pictures are fewer than one step of {global_batch} "
                        f"(batch_size_per_gpu x accum_steps x processes); lower --batch_size_per_gpu")

    # ---- networks, loss, optimizer ----
    network, teacher, info = build_networks(args)
    if args.use_bn_in_head and device.type == "cuda" and world_size > 1:
        network, teacher = map(nn.SyncBatchNorm.convert_sync_batchnorm, (network, teacher))
    network, teacher, dino_loss = network.to(device), teacher.to(device), DINOLoss(args.out_dim).to(device)
    optimizer = build_optimizer(args.optimizer, param_groups(network))
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    say(data.note)
    say(f"{args.arch}/{args.patch_size}, width {args.embed_dim}, {args.depth} blocks, "
        f"{sum(p.numel() for p in network.backbone.parameters()) / 1e6:.1f} M parameters; {args.out_dim} prototypes")
    say(f"{args.epochs} epochs of {steps_per_epoch} steps of {global_batch} pictures in {args.precision} on {world_size} x "
        f"{device.type}; effective lr {args.lr * global_batch / 256:.3g} = {args.lr:g} * {global_batch} / 256")

    # ---- a new run, or the rest of one ----
    objects = dict(student=network, teacher=teacher, dino_loss=dino_loss, optimizer=optimizer, scaler=scaler)
    first_step, knn = 0, {}
    if (output / "checkpoint.pth").exists():
        first_step, knn = resume(output / "checkpoint.pth", args, objects)
        say(f"going on at step {first_step} of {total_steps} with {output / 'checkpoint.pth'}")
        if first_step >= total_steps:
            say(f"this run is complete; to train anew choose another --output_dir or remove {output}")
    elif rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        (output / "log.jsonl").unlink(missing_ok=True)
    if rank == 0:
        write_flags(output / "flags.txt", args)
    student = network
    if world_size > 1:
        student = nn.parallel.DistributedDataParallel(
            network, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    def log(**record):
        if rank == 0:
            with open(output / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    # ---- judging ----
    judge = Judge(data, args, rank, world_size) if args.knn_every and data.queries is not None else None

    def measure(name, features):
        knn[name] = judge(features)
        log(knn=name, top1=knn[name][0], top5=knn[name][1])
        say(f"k-NN on {name}: top-1 {knn[name][0]:.1f}%, top-5 {knn[name][1]:.1f}%")

    if judge and not knn:
        measure("raw pixels", pixel_features)
        measure("untrained backbone", teacher.backbone)

    # ---- training ----
    brightness, contrast, saturation, hue = args.color_jitter
    multicrop = MultiCrop(
        args.global_crops_size, args.global_crops_scale, args.local_crops_size, args.local_crops_scale,
        args.local_crops_number, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue, blur=args.blur,
        blur_radius=args.blur_radius)
    batches = iter(torch.utils.data.DataLoader(
        Views(data.train, multicrop, args.seed), num_workers=args.num_workers, collate_fn=collate,
        batch_sampler=batch_keys(first_step, total_steps, len(data.train), args, rank, world_size),
        pin_memory=device.type == "cuda"))
    bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=rank != 0 or not sys.stderr.isatty())
    unreadable, epoch_stats = set(), []
    clock, clock_step = time.perf_counter(), first_step
    for step in range(first_step, total_steps):
        epoch = step // steps_per_epoch
        end_of_epoch = (step + 1) % steps_per_epoch == 0
        log_now = end_of_epoch or (step + 1) % args.log_every == 0
        now = settings_at(step, steps_per_epoch, global_batch, args)
        torch.manual_seed(counted_seed("drop path", args.seed, step, rank))
        passes = []
        for _ in range(args.accum_steps):
            views, messages = next(batches)
            passes.append([view.to(device, non_blocking=True) for view in views])
            for message in set(messages) - unreadable:
                unreadable.add(message)
                tqdm.write(f"skipped unreadable picture {message}")

        stats = train_step(student, teacher, dino_loss, optimizer, scaler, passes, now, args, diagnose=log_now)

        bar.update()
        if log_now:
            stats = torch.stack(list(stats.values()))
            if world_size > 1:
                dist.all_reduce(stats)
            loss, entropy, entropy_of_mean = (stats / world_size).tolist()
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss is {loss} at step {step}: nothing was saved since the last checkpoint; try "
                                         f"--precision fp32 or a lower --lr")
            speed = (step + 1 - clock_step) * global_batch / (time.perf_counter() - clock)
            clock, clock_step = time.perf_counter(), step + 1
            epoch_stats.append((entropy, entropy_of_mean, loss - entropy))
            log(step=step, epoch=epoch, loss=loss, ln_k=math.log(args.out_dim), teacher_entropy=entropy,
                teacher_entropy_of_mean=entropy_of_mean, kl=loss - entropy, lr=now.lr, weight_decay=now.weight_decay,
                momentum=now.momentum, teacher_temp=now.teacher_temp, images_per_second=speed, unreadable=len(unreadable))
            line = (f"loss {loss:.3f} (ln K {math.log(args.out_dim):.2f}) teacher entropy {entropy:.2f} KL "
                    f"{loss - entropy:.3f} lr {now.lr:.1e} {speed:.0f} img/s")
            bar.set_postfix_str(line)
            if bar.disable:
                say(f"epoch {epoch} step {step + 1}/{total_steps} {line}")

        if end_of_epoch:
            means = [sum(values) / len(values) for values in zip(*epoch_stats)]
            epoch_stats.clear()
            trouble = collapse(*means, args.out_dim) if epoch >= max(args.warmup_epochs, args.freeze_last_layer) else None
            if trouble:
                say(f"WARNING: epoch {epoch} has {trouble}")
            last = step + 1 == total_steps
            best_before = max((top1 for top1, _ in list(knn.values())[2:]), default=-1.0)
            if judge and ((epoch + 1) % args.knn_every == 0 or last):
                measure(f"epoch {epoch}", teacher.backbone)
            if rank == 0:
                info["epoch"] = epoch + 1
                save_model(output / "teacher.safetensors", teacher.state_dict(), info)
                save_model(output / "student.safetensors", network.state_dict(), info)
                if f"epoch {epoch}" in knn and knn[f"epoch {epoch}"][0] > best_before:
                    save_model(output / "teacher_best.safetensors", teacher.state_dict(), info)
                state = {name: thing.state_dict() for name, thing in objects.items()}
                names = ["checkpoint.pth"]
                if args.saveckp_freq and (epoch + 1) % args.saveckp_freq == 0:
                    names.append(f"checkpoint{epoch:04}.pth")
                for name in names:
                    save_state(output / name, **state, step=step + 1, knn=knn, flags=vars(args), info=info)
            clock, clock_step = time.perf_counter(), step + 1
    bar.close()
    if judge:
        say("k-NN top-1, k = 20, in percent:")
        for name in list(knn)[:2] + list(knn)[-1:]:
            say(f"  {name:20s} {knn[name][0]:5.1f}")
    say(f"next: python evaluate.py knn --ckpt {output / 'teacher.safetensors'}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (DataError, CheckpointError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
