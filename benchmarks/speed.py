"""Speed and memory of training and inference, next to the reference implementation.

    python -m benchmarks.speed step --settings fp32 bf16+compile --batch_size_per_gpu 8   # a whole training step
    python -m benchmarks.speed step --reference DIR                      # next to a checkout of facebookresearch/dino
    python -m benchmarks.speed loss --reference DIR --batch_size_per_gpu 32      # loss and center, forward and backward
    python -m benchmarks.speed update --reference DIR                            # clipping, optimizer, EMA
    python -m benchmarks.speed views --reference DIR --data_path /photos         # image files to crops
    python -m benchmarks.speed parts @recipes/demo.txt                           # the parts of a step, one by one
    python -m benchmarks.speed features --reference DIR --batch_size_per_gpu 32  # inference: the paper's im/s
    python -m benchmarks.speed video --reference DIR --patch_size 8              # label propagation, 480 x 832 frames

Other flags are those of train.py, flag files included; --settings replaces --precision, --compile and
--activation_checkpointing. All rows are timed in one process, on the same data and in alternation, so that other load
on the machine affects all of them: compare the ratios. Standard output gets one JSON object per row, standard error a
table.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import math
import statistics
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from backbones import build_backbone
from benchmarks import checkout
from common import cli
from common.estimate import time_call
from common.precision import DTYPES, autocast, reset_matmul_precision, resolve_precision, set_matmul_precision
from data.datasets import DataError, open_data
from data.loaders import MultiCropDataset, build_multicrop
from dino_loss import MultiCropWrapper, update_teacher
from evaluation.label_propagation import propagate_to_frame
from optim import clip_gradients

MATMUL_SIZE = {"cuda": 8192, "mps": 4096, "cpu": 2048}  # large enough to reach the peak
COLUMNS = dict(ms=".1f", ms_min=".1f", ms_max=".1f", images_per_sec=".2f", peak_mib=".0f", mfu=".0%",
               gflops_per_image=".1f", peak_gflops=".0f", ratio=".2f")  # of the table, with their formats
SCHEDULE = train.Schedule(lr=1e-4, weight_decay=0.1, momentum=0.998, teacher_temp=0.04, freeze_last_layer=False)
SETTINGS = list(map("".join, itertools.product(DTYPES, ("", "+compile"), ("", "+checkpointing"))))


def parse_args(argv=None):
    parser = cli.build_parser("speed.py", __doc__)
    parser.add_argument("task", choices=[*TASKS, "views", "parts"], help="what to time")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["fp32"], metavar="S",
                        help="rows: fp32, bf16 or fp16; append +compile, and for step +checkpointing")
    parser.add_argument("--reference", metavar="DIR", help="checkout of facebookresearch/dino, timed as one more row")
    parser.add_argument("--warmup", type=cli.positive_int, default=2, help="untimed calls of each row")
    parser.add_argument("--runs", type=cli.positive_int, default=5, help="timed calls of each row")
    args = parse_train_flags(parser, argv)
    if args.task == "parts" and (len(args.settings) > 1 or args.reference):
        parser.error("parts times this code in one of --settings: give one, and no --reference")
    if args.task not in ("step", "parts") and any("checkpointing" in name for name in args.settings):
        parser.error(f"--settings: +checkpointing needs a backward pass through the backbone, {args.task} has none")
    if args.task == "video":
        args.batch_size_per_gpu = 1
    return args


def parse_train_flags(parser, argv):
    """Flags of a parser, and those of train.py, with which the others are parsed."""
    args, train_flags = parser.parse_known_args(argv)
    train_args = train.parse_args(["--batch_size_per_gpu", "8", *train_flags], follow_run=False)
    args = argparse.Namespace(**vars(train_args) | vars(args))
    if args.patch_size is None:
        parser.error(f"--arch {args.arch} is not one of vit.py's, which are timed here")
    return args


def replace_flags(args, **changes):
    return argparse.Namespace(**vars(args) | changes)


# ---- what the tasks are made of ----

class Ours:
    """This repository, in one of SETTINGS."""

    loss_args = dict(teacher_temp=SCHEDULE.teacher_temp, overwrite=True)

    def __init__(self, args, setting="fp32"):
        self.args = replace_flags(args, precision=setting.partition("+")[0], compile="compile" in setting,
                                  activation_checkpointing="checkpointing" in setting)
        self.set_precision = functools.partial(set_matmul_precision, args.device, self.args.precision)

    def build_backbone(self):
        model = build_backbone(train.model_arguments(self.args)[0]).to(self.args.device).eval()
        if self.args.compile:
            train.compile_blocks(model)
        return model

    def build_training(self):
        """{name: student, teacher, loss, optimizer and gradient scaler}."""
        objects = train.build_training(self.args, torch.device(self.args.device), world_size=1)
        train.wrap_student(objects["student"], objects["teacher"], self.args, None, world_size=1)
        return objects

    def step(self, crops, **objects):
        finite = torch.ones((), dtype=torch.bool, device=self.args.device)
        return train.train_step(*objects.values(), [crops], SCHEDULE, self.args, finite)

    def update(self, student, teacher, optimizer, **others):
        clip_gradients(student.parameters(), self.args.clip_grad, self.args.clip_mode == "per_parameter")
        optimizer.step()
        update_teacher(teacher, student, SCHEDULE.momentum)

    def propagate(self, model, frame, features, labels):
        with autocast(self.args.device, self.args.precision):
            tokens = model.get_intermediate_layers(frame[None])[0][0, 1:]
        propagate_to_frame(F.normalize(tokens.float(), dim=-1).view_as(features[0]), features, labels)


class Reference:
    """The same of facebookresearch/dino: its classes and functions, in its order. Needs the context of `patches`."""

    loss_args = dict(epoch=0)

    def __init__(self, args):
        checkout.check_flags(args)
        sys.modules.setdefault("cv2", argparse.Namespace())  # its evaluation imports it to read frames
        *modules, self.video = checkout.import_reference(args.reference, args.device, "eval_video_segmentation")
        self.main_dino, self.utils, self.vision_transformer = modules
        use_fp16 = args.device == "cuda" and args.task == "step"
        self.args = replace_flags(args, freeze_last_layer=0, precision="fp16" if use_fp16 else "fp32")
        self.set_precision = reset_matmul_precision
        self.patches = [*checkout.list_patches(*modules, args),
                        (self.utils.MetricLogger, "log_every", lambda self, loader, *_: loader)]
        self.video.args, self.neighborhood = argparse.Namespace(size_mask_neighborhood=12, topk=5), None

    def build_backbone(self, drop_path_rate=0.0):
        return self.vision_transformer.vit_small(drop_path_rate=drop_path_rate).to(self.args.device).eval()

    def build_training(self):
        head = self.args.out_dim, self.args.use_bn_in_head, self.args.norm_last_layer
        student, teacher = (
            self.utils.MultiCropWrapper(x, self.main_dino.DINOHead(x.embed_dim, *head)).to(self.args.device).train()
            for x in (self.build_backbone(self.args.drop_path_rate), self.build_backbone()))
        crops, temp = 2 + self.args.local_crops_number, SCHEDULE.teacher_temp
        return dict(
            student=student, teacher=teacher.requires_grad_(False),
            dino_loss=self.main_dino.DINOLoss(self.args.out_dim, crops, temp, temp, 0, nepochs=1).to(self.args.device),
            optimizer=torch.optim.AdamW(self.utils.get_params_groups(student)),
            scaler=torch.amp.GradScaler("cuda") if self.args.precision == "fp16" else None)

    def step(self, crops, student, teacher, dino_loss, optimizer, scaler):
        return self.main_dino.train_one_epoch(
            checkout.wrap_single_process(student), teacher, teacher, dino_loss, [(crops, None)], optimizer,
            [SCHEDULE.lr], [SCHEDULE.weight_decay], [SCHEDULE.momentum], 0, scaler, self.args)["loss"]

    @torch.no_grad()
    def update(self, student, teacher, optimizer, **others):
        self.utils.clip_gradients(student, self.args.clip_grad)
        optimizer.step()
        for ours, theirs in zip(student.parameters(), teacher.parameters()):
            theirs.data.mul_(SCHEDULE.momentum).add_((1 - SCHEDULE.momentum) * ours.detach().data)

    def propagate(self, model, frame, features, labels):
        *_, self.neighborhood = self.video.label_propagation(  # the mask of nearby patches is computed once per video
            self.video.args, model, frame, [x.flatten(0, 1).T for x in features], list(labels[:, None]),
            self.neighborhood)


# ---- tasks: iterators over calls, of which only the calls are timed ----

def bench_step(code, args):
    return itertools.repeat(functools.partial(code.step, random_crops(args), **code.build_training()))


def bench_loss(code, args):
    dino_loss = code.build_training()["dino_loss"]
    student, teacher = (torch.empty(crops * args.batch_size_per_gpu, args.out_dim, device=args.device)
                        for crops in (2 + args.local_crops_number, 2))
    student.requires_grad_()
    while True:
        torch.manual_seed(0)
        for logits in (student, teacher):  # filled before each call, because the gradient overwrites the student's
            logits.data.normal_(std=1 / 16)  # like cosines in 256 dimensions, the output of a normalized last layer
        yield lambda: torch.autograd.grad(dino_loss(student, teacher, **code.loss_args), student)


def bench_update(code, args):
    objects = code.build_training()
    while True:
        torch.manual_seed(0)
        for p in objects["student"].parameters():  # gradients of norm 1, below the clipping threshold, as in most steps
            p.grad = torch.randn_like(p).div_(math.sqrt(p.numel())) if p.requires_grad else None
        yield functools.partial(code.update, **objects)


def bench_features(code, args):
    forward = autocast(args.device, code.args.precision)(code.build_backbone().forward)
    return itertools.repeat(torch.no_grad()(functools.partial(forward, random_crops(args)[0])))


@torch.no_grad()
def bench_video(code, args):
    """A DAVIS-sized frame [3, 480, 832], from features [8, h, w, D] and labels [8, 3, h, w] of the 8 frames before it.

    A smooth moving scene with noise, because the nearest patches are found faster among unrelated frames.
    """
    h, w = 480 // args.patch_size, 832 // args.patch_size
    scene = F.interpolate(torch.randn(1, 3, 30, 60, device=args.device), size=(480, 960), mode="bicubic")
    frames = torch.cat([scene[..., 4 * t:832 + 4 * t] for t in range(9)])
    frames += 0.05 * torch.randn_like(frames)
    tokens = Ours(args).build_backbone().get_intermediate_layers(frames[:8])[0][:, 1:]
    features = F.normalize(tokens, dim=-1).unflatten(1, (h, w))
    labels = torch.rand(8, 3, h, w, device=args.device)
    propagate = functools.partial(code.propagate, code.build_backbone(), frames[8], features, labels)
    return itertools.repeat(torch.no_grad()(propagate))


TASKS = {"step": bench_step, "loss": bench_loss, "update": bench_update, "features": bench_features,
         "video": bench_video}  # and views and parts, see list_view_rows and list_part_rows


def random_crops(args):
    """V normalized crops [B, 3, s, s], the same for every row."""
    torch.manual_seed(0)
    sizes = [args.global_crops_size] * 2 + [args.local_crops_size] * args.local_crops_number
    return [torch.randn(args.batch_size_per_gpu, 3, s, s, device=args.device) for s in sizes]


def list_view_rows(args, reference=None):
    """{row: function that returns its calls}: a loader worker, its parts with --views device, other libraries."""
    torch.set_num_threads(1)  # as in a loader worker
    images, B = open_data(args.data_path).train, args.batch_size_per_gpu
    batches = [[(0, (i * B + j) % len(images)) for j in range(B)] for i in range(2 + args.warmup + args.runs)]
    worker, decoder = (MultiCropDataset(images, build_multicrop(replace_flags(args, views=views)), args.seed)
                       for views in ("cpu", "device"))
    scale, local_scale, number = args.global_crops_scale, args.local_crops_scale, args.local_crops_number
    others = {"reference": reference.main_dino.DataAugmentationDINO(scale, local_scale, number)} if reference else {}
    if importlib.util.find_spec("lightly"):
        from lightly.transforms import DINOTransform

        others["lightly"] = DINOTransform(args.global_crops_size, scale, args.local_crops_size, local_scale, number)
    datasets = {name: checkout.TransformedImages(images, augment) for name, augment in others.items()}
    datasets |= {"on a worker": worker, "files to pixels": decoder}

    def load(dataset):
        for keys in batches:
            yield lambda keys=keys: [dataset[key] for key in keys]

    def render(multicrop):
        for keys in batches:
            pixels, params = zip(*(decoder[key][0] for key in keys))
            yield functools.partial(multicrop, torch.cat(pixels).to(args.device), torch.stack(params))

    rows = {name: functools.partial(load, dataset) for name, dataset in datasets.items()}
    rows[f"pixels on {args.device}"] = functools.partial(render, decoder.multicrop)
    if args.device == "cuda":
        rows["pixels on cuda, compiled"] = functools.partial(
            render, build_multicrop(replace_flags(args, views="device"), compile=True))
    return rows


def list_part_rows(args):
    """{row: function that returns its calls}: the parts of a training step by themselves, then the whole step."""
    code, images, B = Ours(args, args.settings[0]), open_data(args.data_path).train, args.batch_size_per_gpu
    objects, crops = code.build_training(), random_crops(args)
    backbone, head = objects["student"].backbone, objects["student"].head
    features = torch.randn(len(crops) * B, backbone.embed_dim, device=args.device, requires_grad=True)
    keys = [(0, i % len(images)) for i in range(B)]
    worker = MultiCropDataset(images, build_multicrop(replace_flags(args, views="cpu")), args.seed)

    in_precision = autocast(args.device, code.args.precision)

    def run_backward(module, x):
        output = in_precision(module)(x)
        output.backward(torch.ones_like(output))

    parts = {
        "images": lambda: [images[index] for _, index in keys],
        "images and crops": lambda: [worker[key] for key in keys],
        "teacher": torch.no_grad()(functools.partial(in_precision(objects["teacher"].forward), crops[:2])),
        "student backbone": functools.partial(run_backward, MultiCropWrapper(backbone, nn.Identity()).forward, crops),
        "student head": functools.partial(run_backward, head.forward, features),
    }
    tasks = {"loss": bench_loss, "update": bench_update, "whole step": bench_step}
    return {name: functools.partial(itertools.repeat, call) for name, call in parts.items()} | {
        name: functools.partial(task, code, args) for name, task in tasks.items()}


# ---- measuring ----

def count_flops(args):
    """FLOPs per image of one call: matrix products, convolutions and attention, without recomputation.

    Counted on tensors without data, so nothing is computed.
    """
    args = replace_flags(args, batch_size_per_gpu=1, device="cpu")
    call = next(TASKS[args.task](Ours(args), args))
    without_data, unfused = FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH)
    with without_data, unfused, FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def measure_peak_flops(device, precision):
    """FLOP/s of square matrix products, best of three."""
    size = MATMUL_SIZE[device]
    set_matmul_precision(device, precision)
    a, b = torch.randn(2, size, size, device=device).to(DTYPES[precision])
    return 2 * size**3 / min(time_call(lambda: a @ b, device) for _ in range(3))


def measure_memory(build, device):
    """calls = build(), and the peak of bytes allocated by torch since, in the second call; None on MPS."""
    before = torch.cuda.memory_allocated()  # 0 without CUDA
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        calls = build()
        for name in ("first call", "second call"):
            call = next(calls)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with torch.profiler.record_function(name):
                call()
    if device != "cpu":
        return calls, torch.cuda.max_memory_allocated() - before or None
    allocated = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
        elif event.name() == "second call":
            peak = allocated
    return calls, peak


def main(args):
    cli.set_num_threads(args)
    torch._dynamo.config.recompile_limit = 6 * len(args.settings)  # graphs of a row: crop sizes, last block, teacher
    rows = {"reference": Reference(args)} if args.reference else {}
    with checkout.patch_all(rows["reference"].patches if rows else []):
        if args.task in ("views", "parts"):
            builders = list_view_rows(args, **rows) if args.task == "views" else list_part_rows(args)
            rows = dict.fromkeys(builders, Ours(args, args.settings[0])) | rows
        else:
            rows |= {setting: Ours(args, setting) for setting in args.settings}
            builders = {name: functools.partial(TASKS[args.task], code, args) for name, code in rows.items()}
        calls, memory, seconds = {}, {}, {name: [] for name in rows}
        for name, code in rows.items():
            code.set_precision()
            calls[name], memory[name] = measure_memory(builders[name], args.device)
        flops = count_flops(args) if args.task in ("step", "features") else None
        # no peaks of precisions that a CPU emulates, where a single product may take a minute
        native = ("fp32", resolve_precision("auto", "cpu")) if args.device == "cpu" else tuple(DTYPES)
        peaks = {p: 0.0 for p in native if flops and p in {code.args.precision for code in rows.values()}}
        for i in range(args.warmup + args.runs):
            for name, code in rows.items():
                code.set_precision()
                seconds[name] += [time_call(next(calls[name]), args.device)] * (i >= args.warmup)
            for precision, peak in peaks.items():  # after every turn, because clock speeds vary
                peaks[precision] = max(peak, measure_peak_flops(args.device, precision))
    print_results(args, seconds, memory, flops, {name: peaks.get(code.args.precision) for name, code in rows.items()})


def print_results(args, seconds, memory, flops, peaks):
    """Print a row for each code."""
    flags = dict(task=args.task, device=args.device, threads=torch.get_num_threads(), torch=torch.__version__)
    defaults = vars(parse_args(["step"]))
    flags |= {name: value for name, value in vars(args).items() if value != defaults[name]}
    rows = {}
    for name, values in seconds.items():
        median, peak = statistics.median(values), peaks[name]
        images_per_sec = args.batch_size_per_gpu / median
        rows[name] = dict(
            ms=1000 * median, ms_min=1000 * min(values), ms_max=1000 * max(values), images_per_sec=images_per_sec,
            peak_mib=memory[name] and memory[name] / 2**20, mfu=peak and flops * images_per_sec / peak,
            gflops_per_image=flops and flops / 1e9, peak_gflops=peak and peak / 1e9,
            ratio=args.reference and statistics.median(a / b for a, b in zip(seconds["reference"], values)))
    print_rows(flags, rows, COLUMNS)


def print_rows(flags, rows, columns):
    """Print one JSON object per row to standard output, and a table to standard error.

    Args:
        flags: of all rows.
        rows: {name: {key: value}}.
        columns: of the table, {key: format}.
    """
    line = "{:24s}" + "".join(f"{{:>{max(9, len(key)) + 2}s}}" for key in columns)
    print(", ".join(f"{name} {value}" for name, value in flags.items()), file=sys.stderr)
    print(line.format("", *columns), file=sys.stderr)
    for name, row in rows.items():
        print(json.dumps(flags | {"row": name} | row), flush=True)
        cells = ("" if row[key] is None else format(row[key], columns[key]) for key in columns)
        print(line.format(name, *cells), file=sys.stderr)


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, checkout.ReferenceImplementationError)
