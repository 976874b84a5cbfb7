"""How fast, and how much memory, beside the reference implementation.

    python bench.py step --settings fp32 bf16+compile --batch_size_per_gpu 8      # a whole training step
    python bench.py step --reference DIR                              # beside a checkout of facebookresearch/dino
    python bench.py loss --reference DIR --batch_size_per_gpu 32      # loss and centre, forward and backward
    python bench.py update --reference DIR                            # clip, optimizer, teacher
    python bench.py views --reference DIR --data_path /photos         # files to views, and lightly's where installed
    python bench.py features --reference DIR --batch_size_per_gpu 32  # the frozen backbone: the paper's im/s
    python bench.py video --reference DIR --patch_size 8              # labels of 8 frames to the next, of 480 x 832

Everything is timed in one process, on the same data, turn and turn about, so that what else the machine does
falls on all alike: read the ratios. A JSON line for each row goes to standard output, a table for people to
standard error. The step is the function that train.py runs.
"""

import argparse
import atexit
import functools
import importlib.util
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
import types

import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from augment import BatchMultiCrop, MultiCrop
from benchmarks.checkout import (
    FILES,
    ReferenceImplementationError,
    import_reference,
    init_single_process,
    stub_cuda_calls,
)
from common import cli
from common.cli import nonnegative_int, positive_int
from common.precision import DTYPES, autocast, reset_matmul_precision, set_matmul_precision
from data.datasets import DataError, ImageFolder
from data.images import read_image
from data.shapes import Shapes
from dino_loss import DINOLoss
from evaluation.label_propagation import propagate_to_frame
from optim import build_optimizer, build_param_groups
from step import Settings, apply_gradients, build_networks, compile_blocks, train_step
from vit import SIZES, VisionTransformer


class BenchError(ValueError):
    """Something that cannot be measured here."""


def parse_args(argv=None):
    parser = cli.build_parser("bench.py", __doc__)
    parser.add_argument("task", choices=list(TASKS), help="what to time")
    parser.add_argument("--settings", nargs="+", type=setting_name, metavar="S", default=["fp32"],
                        help="rows: fp32, bf16 or fp16, with +compile and +checkpointing if wanted (default: fp32); "
                             "views have rows of their own, features and video no checkpointing")
    parser.add_argument("--reference", metavar="DIR", help="checkout of facebookresearch/dino to time beside")
    parser.add_argument("--arch", choices=list(SIZES), default="vit_small", help="(default: vit_small)")
    for name, default, kind in (("patch_size", 16, positive_int), ("batch_size_per_gpu", 8, positive_int),
                                ("out_dim", 65536, positive_int), ("global_crops_size", 224, positive_int),
                                ("local_crops_size", 96, positive_int), ("local_crops_number", 8, nonnegative_int),
                                ("warmup", 2, positive_int), ("runs", 5, positive_int)):
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"(default: {default})")
    parser.add_argument("--data_path", metavar="DIR", help="pictures to make views of (default: generated JPEGs)")
    parser.add_argument("--device", type=cli.device_name, default="auto", help="cuda, mps or cpu (default: the first there)")
    return parser.parse_args(argv)


def setting_name(text):
    """An argparse type: what `setting` understands."""
    precision, more = setting(text)
    if precision not in DTYPES or not {"compile", "checkpointing"}.issuperset(more):
        raise argparse.ArgumentTypeError(f"{text!r} is not fp32, bf16 or fp16, with +compile or +checkpointing behind")
    return text


def setting(name):
    """ "bf16+compile" -> ("bf16", {"compile"})."""
    precision, *more = name.split("+")
    return precision, set(more)


# ---- what is timed: (prepare, call), of which the second is ----

def nothing():
    pass


def networks(args):
    size = SIZES[args.arch]
    vit = dict(img_size=args.global_crops_size, patch_size=args.patch_size, **size)
    return build_networks(vit, dict(out_dim=args.out_dim), drop_path_rate=0.1)


def random_views(args):
    torch.manual_seed(0)  # the same for all rows
    sizes = [args.global_crops_size] * 2 + [args.local_crops_size] * args.local_crops_number
    return [torch.randn(args.batch_size_per_gpu, 3, s, s, device=args.device) for s in sizes]


def settings_of(step):
    """Of a step in the middle of training."""
    return Settings(step, lr=1e-4, weight_decay=0.1, momentum=0.998, teacher_temp=0.04, frozen=False)


def our_step(args, precision, more):
    dino_loss, views = DINOLoss(args.out_dim).to(args.device), random_views(args)
    student, teacher = (network.to(args.device) for network in networks(args))
    student.backbone.activation_checkpointing = "checkpointing" in more
    if "compile" in more:
        compile_blocks(student, teacher)
    optimizer = build_optimizer("adamw", build_param_groups(student))
    scaler = torch.amp.GradScaler(args.device, enabled=precision == "fp16")
    reached = torch.tensor(0, device=args.device)
    steps = itertools.count()

    def step():
        set_matmul_precision(args.device, precision)
        now = settings_of(next(steps))
        train_step(student, teacher, dino_loss, optimizer, scaler, reached, [views], now, precision)
    return nothing, step


def our_loss(args, precision, more):
    dino_loss, (student, teacher) = DINOLoss(args.out_dim).to(args.device), empty_logits(args)
    return (lambda: fill(student, teacher),  # anew each time, for the gradient takes their place
            lambda: torch.autograd.grad(dino_loss(student, teacher, 0.04, overwrite=True), student))


def our_update(args, precision, more):
    student, teacher = (network.to(args.device) for network in networks(args))
    optimizer = build_optimizer("adamw", build_param_groups(student))
    scaler, reached = torch.amp.GradScaler(args.device, enabled=False), torch.tensor(0, device=args.device)
    steps = itertools.count()
    return (lambda: give_gradients(student),
            lambda: apply_gradients(student, teacher, optimizer, scaler, reached, [], settings_of(next(steps))))


def frozen_backbone(args, more):
    if "checkpointing" in more:
        raise BenchError(f"{args.task}: nothing is computed again where there is no backward")
    model = VisionTransformer(args.global_crops_size, args.patch_size, **SIZES[args.arch]).to(args.device).eval()
    if "compile" in more:
        for block in model.blocks:
            block.compile(dynamic=False)
    return model


def our_features(args, precision, more):
    images, model = random_views(args)[0], frozen_backbone(args, more)

    def features():
        set_matmul_precision(args.device, precision)
        with torch.no_grad(), autocast(args.device, precision):
            model(images)
    return nothing, features


def our_video(args, precision, more):
    model, (frame, features, labels) = frozen_backbone(args, more), video_so_far(args)

    def video():
        set_matmul_precision(args.device, precision)
        with torch.no_grad(), autocast(args.device, precision):
            tokens = model.get_intermediate_layers(frame[None])[0][0, 1:]
        propagate_to_frame(F.normalize(tokens.float(), dim=-1).view_as(features[0]), features, labels)
    return nothing, video


def video_so_far(args):
    """A frame of the size of DAVIS's, [3, 480, 832], features [8, h, w, D] and labels [8, 3, h, w] of those before it.

    A smooth scene that moves and is noisy: where nothing is like anything else the largest are found sooner.
    """
    h, w = 480 // args.patch_size, 832 // args.patch_size
    scene = F.interpolate(torch.randn(1, 3, 30, 60, device=args.device), size=(480, 960), mode="bicubic")
    frames = torch.cat([scene[..., 4 * t:832 + 4 * t] for t in range(9)])
    frames = frames + 0.05 * torch.randn_like(frames)
    model = frozen_backbone(args, set())
    with torch.no_grad():
        features = torch.cat([model.get_intermediate_layers(frame[None])[0][:, 1:] for frame in frames[:8]])
    labels = torch.rand(8, 3, h, w, device=args.device)
    return frames[8], F.normalize(features, dim=-1).unflatten(1, (h, w)), labels


def empty_logits(args):
    student, teacher = (torch.empty(views * args.batch_size_per_gpu, args.out_dim, device=args.device)
                        for views in (2 + args.local_crops_number, 2))
    return student.requires_grad_(), teacher


def fill(*logits):
    """With cosines over 256 dimensions: what heads with prototypes of length 1 give."""
    torch.manual_seed(0)
    for x in logits:
        x.data.normal_(std=1 / 16)


def give_gradients(network):
    """Random ones, of norms below the clip, as they mostly are."""
    torch.manual_seed(0)
    for p in network.parameters():
        p.grad = torch.randn_like(p).div_(math.sqrt(p.numel())) if p.requires_grad else None


class Reference:
    """facebookresearch/dino from a checkout: its classes and functions in the order in which it calls them."""

    def __init__(self, folder, args):
        self.folder, self.args = folder, args
        self.main_dino, self.utils, self.vision_transformer = import_reference(folder, *FILES)
        init_single_process(args.device)
        trains = args.task not in ("features", "video")
        self.precision = "fp16" if args.device == "cuda" and trains else "fp32"  # what it has
        self.scaler = torch.amp.GradScaler(args.device) if self.precision == "fp16" else None
        if not hasattr(self.vision_transformer, args.arch):
            raise BenchError(f"--reference {folder}: it has no {args.arch}")

    def networks(self):
        args, build = self.args, getattr(self.vision_transformer, self.args.arch)
        student, teacher = (
            self.utils.MultiCropWrapper(
                build(patch_size=args.patch_size, img_size=[args.global_crops_size], drop_path_rate=rate),
                self.vision_transformer.DINOHead(SIZES[args.arch]["embed_dim"], args.out_dim)).to(args.device)
            for rate in (0.1, 0.0))
        return student, teacher.requires_grad_(False)

    def new_loss(self):
        return self.main_dino.DINOLoss(self.args.out_dim, 2 + self.args.local_crops_number, 0.04, 0.04, 0, 1).to(
            self.args.device)

    def step(self):
        student, teacher = self.networks()
        dino_loss, views = self.new_loss(), random_views(self.args)
        optimizer = torch.optim.AdamW(self.utils.get_params_groups(student))

        def step():
            reset_matmul_precision(self.args.device)
            with torch.autocast(self.args.device, torch.float16, enabled=self.scaler is not None):
                teacher_logits = teacher(views[:2])
                student_logits = student(views)
                loss = dino_loss(student_logits, teacher_logits, 0)
            if not math.isfinite(loss.item()):
                raise BenchError("the reference's loss is not finite")
            optimizer.zero_grad()
            (self.scaler.scale(loss) if self.scaler else loss).backward()
            self.apply(student, teacher, optimizer)
            if self.args.device == "cuda":
                torch.cuda.synchronize()
            loss.item()
        return nothing, step

    def loss(self):
        dino_loss, (student, teacher) = self.new_loss(), empty_logits(self.args)
        return (lambda: fill(student, teacher),
                lambda: torch.autograd.grad(dino_loss(student, teacher, 0), student))

    def update(self):
        student, teacher = self.networks()
        optimizer = torch.optim.AdamW(self.utils.get_params_groups(student))
        self.scaler = None
        return lambda: give_gradients(student), lambda: self.apply(student, teacher, optimizer)

    def frozen_backbone(self):
        build = getattr(self.vision_transformer, self.args.arch)
        model = build(patch_size=self.args.patch_size, img_size=[self.args.global_crops_size])
        return model.to(self.args.device).eval()

    def features(self):
        model, images = self.frozen_backbone(), random_views(self.args)[0]

        def features():
            reset_matmul_precision(self.args.device)
            with torch.no_grad():
                model(images)
        return nothing, features

    def video(self):
        device, (frame, features, labels) = self.args.device, video_so_far(self.args)
        sys.modules.setdefault("cv2", types.ModuleType("cv2"))  # reads its frames
        theirs, = import_reference(self.folder, "eval_video_segmentation")
        theirs.args = argparse.Namespace(size_mask_neighborhood=12, topk=5)
        model = self.frozen_backbone()
        before = [x.flatten(0, 1).T for x in features], list(labels[:, None])
        near = None  # which patches are near each other is found once for a video

        def video():
            nonlocal near
            reset_matmul_precision(device)
            with torch.no_grad(), stub_cuda_calls(device):
                near = theirs.label_propagation(theirs.args, model, frame, *before, near)[2]
        return nothing, video

    def views(self, files):
        if (self.args.global_crops_size, self.args.local_crops_size) != (224, 96):
            raise BenchError("--reference: its views have 224 and 96 pixels")
        theirs = self.main_dino.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), self.args.local_crops_number)
        return in_turn(files, self.args.batch_size_per_gpu,
                       lambda files: [theirs(Image.open(file).convert("RGB")) for file in files])

    def apply(self, student, teacher, optimizer):
        for group, weight_decay in zip(optimizer.param_groups, (0.1, 0.0)):
            group.update(lr=1e-4, weight_decay=weight_decay)
        if self.scaler:
            self.scaler.unscale_(optimizer)
        self.utils.clip_gradients(student, 3.0)
        self.utils.cancel_gradients_last_layer(1, student, 1)
        if self.scaler:
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()
        with torch.no_grad():  # it moves its teacher parameter by parameter
            for ours, theirs in zip(student.parameters(), teacher.parameters()):
                theirs.data.mul_(0.998).add_((1 - 0.998) * ours.detach().data)


# ---- views ----

def files_in(folder):
    """JPEGs of 500 x 400 pixels are made in it if it is new."""
    if folder is None:
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder)
        for i in range(64):
            Shapes("train", 64, 500)[i][0].crop((0, 50, 500, 450)).save(f"{folder}/{i}.jpg")
    images = ImageFolder(folder)
    return [os.path.join(images.root, file) for file in images.files]


def in_turn(files, count, use, prepare=list):
    """(prepare, call): the next so many files, as `prepare` makes them, for `use`."""
    numbers, taken = itertools.count(), []

    def take():
        taken[:] = prepare(files[next(numbers) % len(files)] for _ in range(count))

    return take, lambda: use(taken)


def view_rows(args, files):
    """Files to views on a worker; files to what a worker sends; from there to views on the device; lightly's."""
    arguments = (args.global_crops_size, (0.4, 1.0), args.local_crops_size, (0.05, 0.4), args.local_crops_number)
    multicrop, batch = MultiCrop(*arguments), BatchMultiCrop(*arguments)
    row = functools.partial(in_turn, files, args.batch_size_per_gpu)

    def decode(files):
        return [batch.prepare(read_image(file, batch.reduction)) for file in files]

    def send(files):
        return [(pixels.to(args.device), plan) for pixels, plan in decode(files)]

    def render(prepared, views=batch):
        pixels, plans = zip(*prepared)
        return views(pixels, torch.stack(plans))

    rows = {"on a worker": row(lambda files: [multicrop(read_image(file, multicrop.reduction)) for file in files]),
            "files to pixels": row(decode), f"pixels on {args.device}": row(render, send)}
    if args.device == "cuda":
        compiled = BatchMultiCrop(*arguments, compile=True)
        rows["the same, compiled"] = row(functools.partial(render, views=compiled), send)
    if importlib.util.find_spec("lightly"):
        from lightly.transforms import DINOTransform

        theirs = DINOTransform(*arguments, cj_strength=1.0, cj_bright=0.4, cj_contrast=0.4, cj_sat=0.2, cj_hue=0.1)
        rows["lightly"] = row(lambda files: [theirs(Image.open(file).convert("RGB")) for file in files])
    return rows


TASKS = {"step": our_step, "loss": our_loss, "update": our_update, "views": view_rows, "features": our_features,
         "video": our_video}


# ---- how it is measured ----

def flops_per_image(args):
    """Of matrix products, convolutions and attention in one call of the task, recomputation not counted."""
    small = argparse.Namespace(**vars(args) | dict(batch_size_per_gpu=1, out_dim=256, device="cpu"))
    counts = []
    for out_dim in (256, 512):  # linear in out_dim, so two small ones tell the rest
        small.out_dim = out_dim
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            TASKS[args.task](small, "fp32", set())[1]()
        counts.append(counter.get_total_flops())
    return counts[0] + (counts[1] - counts[0]) * (args.out_dim - 256) / 256


def matmul_speed(device, precision):
    """Operations a second of large square matrix products, the best of three."""
    set_matmul_precision(device, precision)
    n = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(DTYPES[precision])
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(3))


def seconds(call, device):
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device):
    if device != "cpu":
        getattr(torch, device).synchronize()


def build_measured(build, device):
    """Build, and call twice: what was built, and the bytes that it holds at most in the second call, all included."""
    if device == "cpu":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            prepare, call = build()
            for name in ("first call", "second call"):
                prepare()
                with torch.profiler.record_function(name):
                    call()
        events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        start = next(event.start_ns() for event in events if event.name() == "second call")
        changes = [event for event in events if event.name() == "[memory]"]
        held = itertools.accumulate(event.nbytes() for event in changes)
        return prepare, call, max(h for h, event in zip(held, changes) if event.start_ns() >= start)
    before = torch.cuda.memory_allocated()  # 0 without CUDA
    prepare, call = build()
    for _ in range(2):
        prepare()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        call()
    return prepare, call, torch.cuda.max_memory_allocated() - before if device == "cuda" else None


def rows_of_views(args, reference):
    """(prepare, call) by name, and memory by name: not known, for most of it is not torch's."""
    torch.set_num_threads(1)
    files = files_in(args.data_path)
    calls = {"reference": reference.views(files)} if reference else {}
    calls |= view_rows(args, files)
    return calls, dict.fromkeys(calls)


def rows_of_settings(args, reference):
    """(prepare, call) by name, and memory by name."""
    builds = {"reference": getattr(reference, args.task)} if reference else {}
    builds |= {name: functools.partial(TASKS[args.task], args, *setting(name)) for name in args.settings}
    calls, memory = {}, {}
    for name, build in builds.items():
        *calls[name], memory[name] = build_measured(build, args.device)
    return calls, memory


def main(args):
    if args.task == "video":
        args.batch_size_per_gpu = 1
    torch._dynamo.config.recompile_limit = 6 * len(args.settings)  # two sizes, the last block, the teacher: six graphs
    reference = Reference(args.reference, args) if args.reference else None
    flops = flops_per_image(args) if args.task in ("step", "features") else None
    calls, memory = (rows_of_views if args.task == "views" else rows_of_settings)(args, reference)
    precisions = {name: reference.precision if name == "reference" else name.partition("+")[0] for name in calls}
    peaks = dict.fromkeys(precisions.values(), 0.0) if flops else {}
    times = {name: [] for name in calls}
    for run in range(args.warmup + args.runs):
        for name, (prepare, call) in calls.items():
            prepare()
            times[name] += [seconds(call, args.device)] * (run >= args.warmup)
        for precision, best in peaks.items():  # in every turn, for no machine is always equally fast
            peaks[precision] = max(best, matmul_speed(args.device, precision))

    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    crops = f"2x{args.global_crops_size} + {args.local_crops_number}x{args.local_crops_size}"
    crops = {"features": f"1x{args.global_crops_size}", "video": "480x832"}.get(args.task, crops)
    say(f"{args.task}: {args.arch}/{args.patch_size}, {crops}, batch {args.batch_size_per_gpu}, K {args.out_dim}, "
        f"{args.device} ({torch.get_num_threads()} threads), torch {torch.__version__}, {args.runs} runs by turns")
    say(f"{'':20s}  {'ms':>9s}  {'min':>9s}  {'max':>9s}  {'img/s':>8s}  {'MiB':>8s}  {'MFU':>5s}  ratio")
    for name, values in times.items():
        middle, mib = statistics.median(values), memory[name] and memory[name] / 2**20
        row = dict(task=args.task, row=name, arch=args.arch, patch_size=args.patch_size, crops=crops,
                   batch=args.batch_size_per_gpu, out_dim=args.out_dim, device=args.device, torch=torch.__version__,
                   runs=args.runs, seconds=middle, seconds_min=min(values), seconds_max=max(values),
                   images_per_second=args.batch_size_per_gpu / middle, peak_mib=mib)
        line = f"{name:20s}  {1000 * middle:9.1f}  {1000 * min(values):9.1f}  {1000 * max(values):9.1f}  " \
               f"{row['images_per_second']:8.2f}  {mib or math.nan:8.0f}  "
        if flops:
            peak = peaks[precisions[name]]
            row |= dict(gflops_per_image=flops / 1e9, peak_gflops=peak / 1e9,
                        mfu=flops * row["images_per_second"] / peak)
        line += f"{row['mfu']:5.0%}  " if flops else "       "
        if args.reference:
            row["ratio"] = statistics.median(r / v for r, v in zip(times["reference"], values))
            line += f"{row['ratio']:.2f}x"
        print(json.dumps(row), flush=True)
        say(line)
    if flops:
        say(f"{flops / 1e9:.1f} GFLOP an image; matrix products at best " + ", ".join(
            f"{peak / 1e9:.0f} GFLOP/s in {precision}" for precision, peak in sorted(peaks.items())))


if __name__ == "__main__":
    cli.run_command(main, parse_args, BenchError, DataError, ReferenceImplementationError)
