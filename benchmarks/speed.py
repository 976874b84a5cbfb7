"""Speed and memory of training and inference, next to the reference implementation.

    python -m benchmarks.speed step --settings fp32 bf16+compile --batch_size_per_gpu 8   # a whole training step
    python -m benchmarks.speed step --reference DIR                      # next to a checkout of facebookresearch/dino
    python -m benchmarks.speed loss --reference DIR --batch_size_per_gpu 32      # loss and center, forward and backward
    python -m benchmarks.speed update --reference DIR                            # clipping, optimizer, EMA
    python -m benchmarks.speed views --reference DIR --data_path /photos         # image files to crops
    python -m benchmarks.speed features --reference DIR --batch_size_per_gpu 32  # inference: the paper's im/s
    python -m benchmarks.speed video --reference DIR --patch_size 8              # label propagation, 480 x 832 frames

All rows are timed in one process, on the same data and in alternation, so that other load on the machine affects all of
them: compare the ratios. Standard output gets one JSON object per row, standard error a table.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
import types
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from augment import BatchMultiCrop, MultiCrop
from benchmarks import checkout
from benchmarks.checkout import ReferenceImplementationError
from common import cli
from common.precision import DTYPES, autocast, reset_matmul_precision, set_matmul_precision
from data.datasets import DataError, ImageFolder
from data.images import read_image
from data.shapes import Shapes
from dino_loss import DINOLoss, update_teacher
from evaluation.label_propagation import propagate_to_frame
from optim import build_optimizer, build_param_groups, clip_gradients
from train import Schedule, build_networks, compile_blocks, train_step
from vit import SIZES, VisionTransformer

MATMUL_SIZE = {"cuda": 8192, "mps": 4096, "cpu": 2048}  # large enough to reach the peak
COLUMNS = {"ms": ".1f", "ms_min": ".1f", "ms_max": ".1f", "images_per_sec": ".2f", "peak_mib": ".0f", "mfu": ".0%",
           "gflops_per_image": ".1f", "peak_gflops": ".0f", "ratio": ".2f"}  # of the table, with their formats
SCHEDULE = Schedule(lr=1e-4, weight_decay=0.1, momentum=0.998, teacher_temp=0.04, freeze_last_layer=False)
CLIP_GRAD = 3.0
SETTINGS = [precision + options for precision in DTYPES
            for options in ("", "+compile", "+checkpointing", "+compile+checkpointing")]


def parse_args(argv=None):
    parser = cli.build_parser("speed.py", __doc__)
    add = parser.add_argument
    add("task", choices=list(TASKS), help="what to time")
    add("--settings", nargs="+", choices=SETTINGS, metavar="S", default=["fp32"],
        help="rows: fp32, bf16 or fp16; append +compile, and for step +checkpointing")
    add("--reference", metavar="DIR", help="checkout of facebookresearch/dino, timed as a row of its own")
    add("--arch", choices=list(SIZES), default="vit_small", help="backbone")
    for name, default, description in (
            ("patch_size", 16, "side of a patch, pixels"), ("batch_size_per_gpu", 8, "images per call"),
            ("out_dim", 65536, "prototypes K of the projection head"), ("global_crops_size", 224, "side, pixels"),
            ("local_crops_size", 96, "side, pixels"), ("local_crops_number", 8, "local crops per image"),
            ("warmup", 2, "untimed calls of each row"), ("runs", 5, "timed calls of each row")):
        kind = cli.nonnegative_int if name == "local_crops_number" else cli.positive_int
        add(f"--{name}", type=kind, default=default, metavar="N", help=description)
    add("--data_path", metavar="DIR", help="folder of images for views; generated JPEGs if absent")
    cli.add_device_flags(parser, workers=False)
    args = parser.parse_args(argv)
    if args.task != "step" and any("checkpointing" in name for name in args.settings):
        parser.error(f"--settings: +checkpointing needs a backward pass through the backbone, {args.task} has none")
    return args


def precision_of(setting):
    return setting.partition("+")[0]


# ---- tasks: functions that return (setup, run), of which only `run` is timed ----

def no_setup():
    pass


def bench_step(args, setting):
    student, teacher = build_student_teacher(args)
    student.backbone.activation_checkpointing = "checkpointing" in setting
    if "compile" in setting:
        compile_blocks(student, teacher)
    dino_loss, crops = DINOLoss(args.out_dim).to(args.device), random_crops(args)
    optimizer = build_optimizer("adamw", build_param_groups(student))
    scaler = torch.amp.GradScaler(args.device, enabled=precision_of(setting) == "fp16")
    step_args = argparse.Namespace(precision=precision_of(setting), clip_grad=CLIP_GRAD, clip_mode="per_parameter")
    finite = torch.tensor(True, device=args.device)
    return no_setup, lambda: train_step(student, teacher, dino_loss, optimizer, scaler, [crops], SCHEDULE, step_args,
                                        finite)


def bench_loss(args, setting):
    dino_loss, (student, teacher) = DINOLoss(args.out_dim).to(args.device), empty_logits(args)
    # filled before each call, because the gradient overwrites the student's logits
    return (lambda: fill_logits(student, teacher),
            lambda: torch.autograd.grad(dino_loss(student, teacher, SCHEDULE.teacher_temp, overwrite=True), student))


def bench_update(args, setting):
    student, teacher = build_student_teacher(args)
    optimizer = build_optimizer("adamw", build_param_groups(student))

    def run():
        clip_gradients(student.parameters(), CLIP_GRAD, per_parameter=True)
        optimizer.step()
        update_teacher(teacher, student, SCHEDULE.momentum)
    return lambda: fill_gradients(student), run


def bench_features(args, setting):
    images, model = random_crops(args)[0], build_backbone(args, setting)

    def run():
        with torch.no_grad(), autocast(args.device, precision_of(setting)):
            model(images)
    return no_setup, run


def bench_video(args, setting):
    model, (frame, features, labels) = build_backbone(args, setting), random_video(args)

    def run():
        with torch.no_grad(), autocast(args.device, precision_of(setting)):
            tokens = model.get_intermediate_layers(frame[None])[0][0, 1:]
        propagate_to_frame(F.normalize(tokens.float(), dim=-1).view_as(features[0]), features, labels)
    return no_setup, run


TASKS = {"step": bench_step, "loss": bench_loss, "update": bench_update, "features": bench_features,
         "video": bench_video, "views": None}  # the rows of views: list_view_rows


class Reference:
    """The same tasks by facebookresearch/dino: its classes and functions, in its order."""

    def __init__(self, folder, args):
        self.folder, self.args = folder, args
        self.main_dino, self.utils, self.vision_transformer = checkout.import_reference(folder)
        checkout.init_single_process(args.device)
        self.precision = "fp16" if args.device == "cuda" and args.task == "step" else "fp32"
        if not hasattr(self.vision_transformer, args.arch):
            raise ReferenceImplementationError(f"--reference {folder}: it has no --arch {args.arch}")
        if args.task == "views" and (args.global_crops_size, args.local_crops_size) != (224, 96):
            raise ReferenceImplementationError(f"--reference {folder}: its crops have 224 and 96 pixels")

    def build_backbone(self, **kwargs):
        return getattr(self.vision_transformer, self.args.arch)(
            patch_size=self.args.patch_size, img_size=[self.args.global_crops_size], **kwargs).to(self.args.device)

    def build_student_teacher(self):
        student, teacher = (self.utils.MultiCropWrapper(backbone, self.vision_transformer.DINOHead(
            backbone.embed_dim, self.args.out_dim)).to(self.args.device)
            for backbone in (self.build_backbone(drop_path_rate=0.1), self.build_backbone()))
        return student, teacher.requires_grad_(False), torch.optim.AdamW(self.utils.get_params_groups(student))

    def build_loss(self):
        crops, temp = 2 + self.args.local_crops_number, SCHEDULE.teacher_temp
        return self.main_dino.DINOLoss(self.args.out_dim, crops, temp, temp, 0, nepochs=2).to(self.args.device)

    def step(self):
        """Its train_one_epoch with a single batch, without its logger."""
        (student, teacher, optimizer), dino_loss = self.build_student_teacher(), self.build_loss()
        scaler = torch.amp.GradScaler("cuda") if self.precision == "fp16" else None
        step_args = argparse.Namespace(epochs=2, clip_grad=CLIP_GRAD, freeze_last_layer=1)
        inputs = (checkout.SingleProcess(student), teacher, teacher, dino_loss, [(random_crops(self.args), None)],
                  optimizer, [SCHEDULE.lr] * 2, [SCHEDULE.weight_decay] * 2, [SCHEDULE.momentum] * 2, 1, scaler,
                  step_args)
        logger = mock.MagicMock(log_every=lambda loader, *_: loader)

        def run():
            with checkout.stub_cuda_calls(self.args.device), mock.patch.object(self.main_dino, "print", create=True), \
                    mock.patch.object(self.utils, "MetricLogger", return_value=logger):
                self.main_dino.train_one_epoch(*inputs)
        return no_setup, run

    def loss(self):
        dino_loss, (student, teacher) = self.build_loss(), empty_logits(self.args)
        return (lambda: fill_logits(student, teacher),
                lambda: torch.autograd.grad(dino_loss(student, teacher, 0), student))

    def update(self):
        student, teacher, optimizer = self.build_student_teacher()

        @torch.no_grad()
        def run():
            self.utils.clip_gradients(student, CLIP_GRAD)
            self.utils.cancel_gradients_last_layer(1, student, 1)
            optimizer.step()
            for ours, theirs in zip(student.parameters(), teacher.parameters()):
                theirs.data.mul_(SCHEDULE.momentum).add_((1 - SCHEDULE.momentum) * ours.detach().data)
        return lambda: fill_gradients(student), run

    def features(self):
        model, images = self.build_backbone().eval(), random_crops(self.args)[0]
        return no_setup, torch.no_grad()(lambda: model(images))

    def video(self):
        model, (frame, features, labels) = self.build_backbone().eval(), random_video(self.args)
        sys.modules.setdefault("cv2", types.ModuleType("cv2"))  # it reads frames with it
        module, = checkout.import_reference(self.folder, ["eval_video_segmentation"])
        module.args = argparse.Namespace(size_mask_neighborhood=12, topk=5)
        sources = [x.flatten(0, 1).T for x in features], list(labels[:, None])
        neighborhood = None  # mask of nearby patches, computed once per video

        def run():
            nonlocal neighborhood
            with torch.no_grad(), checkout.stub_cuda_calls(self.args.device):
                neighborhood = module.label_propagation(module.args, model, frame, *sources, neighborhood)[2]
        return no_setup, run


# ---- networks and inputs ----

def build_student_teacher(args):
    vit = dict(img_size=args.global_crops_size, patch_size=args.patch_size, **SIZES[args.arch])
    student, teacher = build_networks(vit, dict(out_dim=args.out_dim), drop_path_rate=0.1)
    return student.to(args.device), teacher.to(args.device)


def build_backbone(args, setting="fp32"):
    model = VisionTransformer(args.global_crops_size, args.patch_size, **SIZES[args.arch]).to(args.device).eval()
    if "compile" in setting:
        for block in model.blocks:
            block.compile(dynamic=False)
    return model


def random_crops(args):
    """V normalized crops [B, 3, s, s], the same for every row."""
    torch.manual_seed(0)
    sizes = [args.global_crops_size] * 2 + [args.local_crops_size] * args.local_crops_number
    return [torch.randn(args.batch_size_per_gpu, 3, s, s, device=args.device) for s in sizes]


def empty_logits(args):
    student, teacher = (torch.empty(crops * args.batch_size_per_gpu, args.out_dim, device=args.device)
                        for crops in (2 + args.local_crops_number, 2))
    return student.requires_grad_(), teacher


def fill_logits(*logits):
    """Overwrite with values distributed like cosines in 256 dimensions, the output of a normalized last layer."""
    torch.manual_seed(0)
    for x in logits:
        x.data.normal_(std=1 / 16)


def fill_gradients(network):
    """Random gradients of norm 1, below the clipping threshold, as in most steps."""
    torch.manual_seed(0)
    for p in network.parameters():
        p.grad = torch.randn_like(p).div_(math.sqrt(p.numel())) if p.requires_grad else None


def random_video(args):
    """A DAVIS-sized frame [3, 480, 832], and features [8, h, w, D] and labels [8, 3, h, w] of the 8 frames before it.

    A smooth moving scene with noise, because the nearest patches are found faster among unrelated frames.
    """
    h, w = 480 // args.patch_size, 832 // args.patch_size
    scene = F.interpolate(torch.randn(1, 3, 30, 60, device=args.device), size=(480, 960), mode="bicubic")
    frames = torch.cat([scene[..., 4 * t:832 + 4 * t] for t in range(9)])
    frames = frames + 0.05 * torch.randn_like(frames)
    model = build_backbone(args)
    with torch.no_grad():
        features = torch.cat([model.get_intermediate_layers(frame[None])[0][:, 1:] for frame in frames[:8]])
    labels = torch.rand(8, 3, h, w, device=args.device)
    return frames[8], F.normalize(features, dim=-1).unflatten(1, (h, w)), labels


# ---- rows of views: from files to crops ----

def list_view_rows(args, reference):
    """{row: function that returns (setup, run)}: a loader worker, its parts with --views device, other libraries."""
    torch.set_num_threads(1)  # as in a loader worker
    crop_args = (args.global_crops_size, (0.4, 1.0), args.local_crops_size, (0.05, 0.4), args.local_crops_number)
    multicrop, batched = MultiCrop(*crop_args), BatchMultiCrop(*crop_args)

    def decode(files):
        return [batched.prepare(read_image(file, batched.reduction)) for file in files]

    def decode_to_device(files):
        return [(pixels.to(args.device), params) for pixels, params in decode(files)]

    def render(batched, prepared):
        pixels, params = zip(*prepared)
        return batched(pixels, torch.stack(params))

    def augment_each(augment, files):
        return [augment(Image.open(file).convert("RGB")) for file in files]

    rows = {"on a worker": (lambda files: [multicrop(read_image(file, multicrop.reduction)) for file in files],),
            "files to pixels": (decode,),
            f"pixels on {args.device}": (functools.partial(render, batched), decode_to_device)}
    if args.device == "cuda":
        rows["pixels on cuda, compiled"] = (functools.partial(render, BatchMultiCrop(*crop_args, compile=True)),
                                            decode_to_device)
    if reference:
        augment = reference.main_dino.DataAugmentationDINO(crop_args[1], crop_args[3], args.local_crops_number)
        rows = {"reference": (functools.partial(augment_each, augment),)} | rows
    if importlib.util.find_spec("lightly"):
        from lightly.transforms import DINOTransform

        augment = DINOTransform(*crop_args, cj_strength=1.0, cj_bright=0.4, cj_contrast=0.4, cj_sat=0.2, cj_hue=0.1)
        rows["lightly"] = functools.partial(augment_each, augment),
    images = ImageFolder(args.data_path or generate_jpegs().name)
    files = [os.path.join(images.root, file) for file in images.files]
    return {name: functools.partial(iterate_files, files, args.batch_size_per_gpu, *functions)
            for name, functions in rows.items()}


@functools.cache
def generate_jpegs():
    """Temporary directory, until the program exits, of 64 JPEGs of 500 x 400 pixels."""
    folder = tempfile.TemporaryDirectory()
    for i in range(64):
        Shapes("train", 64, 500)[i][0].crop((0, 50, 500, 450)).save(f"{folder.name}/{i}.jpg")
    return folder


def iterate_files(files, batch_size, function, prepare=list):
    """(setup, run): `run` calls a function on the next `batch_size` files, which `setup` has prepared."""
    cycle, batch = itertools.cycle(files), []

    def setup():
        batch[:] = prepare(itertools.islice(cycle, batch_size))
    return setup, lambda: function(batch)


# ---- measuring ----

def count_flops(args):
    """FLOPs per image of one call: matrix products, convolutions and attention, without recomputation."""
    set_matmul_precision(args.device, "fp32")  # computes a product when it is called first
    setup, run = TASKS[args.task](argparse.Namespace(**vars(args) | dict(batch_size_per_gpu=1)), "fp32")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def measure_peak_flops(device, precision, size):
    """FLOP/s of square matrix products, best of three."""
    set_matmul_precision(device, precision)
    a, b = torch.randn(2, size, size, device=device).to(DTYPES[precision])
    return 2 * size**3 / min(time_call(lambda: a @ b, device) for _ in range(3))


def is_peak_measurable(device, precision):
    """False for half precision on a CPU that emulates it, where one product takes over a second."""
    if device != "cpu" or precision == "fp32":
        return True
    return 2 * MATMUL_SIZE["cpu"]**3 / measure_peak_flops(device, precision, 256) < 1


def time_call(call, device):
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def measure_memory(build, device):
    """(setup, run) = build(), and the peak of bytes allocated by torch since, in their second call; None on MPS."""
    if device == "cpu":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            setup, run = build()
            for name in ("first call", "second call"):
                setup()
                with torch.profiler.record_function(name):
                    run()
        events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        start = next(event.start_ns() for event in events if event.name() == "second call")
        allocations = [event for event in events if event.name() == "[memory]"]
        allocated = itertools.accumulate(event.nbytes() for event in allocations)
        return setup, run, max(n for n, event in zip(allocated, allocations) if event.start_ns() >= start)
    before = torch.cuda.memory_allocated()  # 0 without CUDA
    setup, run = build()
    for _ in range(2):
        setup()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run()
    return setup, run, torch.cuda.max_memory_allocated() - before if device == "cuda" else None


def main(args):
    if args.task == "video":
        args.batch_size_per_gpu = 1
    torch._dynamo.config.recompile_limit = 6 * len(args.settings)  # graphs of a row: crop sizes, last block, teacher
    reference = Reference(args.reference, args) if args.reference else None
    if args.task == "views":
        builders = list_view_rows(args, reference)
    else:
        builders = {"reference": getattr(reference, args.task)} if reference else {}
        builders |= {name: functools.partial(TASKS[args.task], args, name) for name in args.settings}
    precisions = {name: precision_of(name) if name in args.settings else "fp32" for name in builders}
    set_precision = {name: functools.partial(set_matmul_precision, args.device, p) for name, p in precisions.items()}
    if reference:
        precisions["reference"] = reference.precision
        set_precision["reference"] = functools.partial(reset_matmul_precision, args.device)

    calls, memory, seconds = {}, {}, {name: [] for name in builders}
    for name, build in builders.items():
        set_precision[name]()
        *calls[name], memory[name] = measure_memory(build, args.device)
    flops, peaks = None, {}
    if args.task in ("step", "features"):
        flops = count_flops(args)
        peaks = {p: 0.0 for p in set(precisions.values()) if is_peak_measurable(args.device, p)}
    for i in range(args.warmup + args.runs):
        for name, (setup, run) in calls.items():
            set_precision[name]()
            setup()
            seconds[name] += [time_call(run, args.device)] * (i >= args.warmup)
        for precision, best in peaks.items():  # after every turn, because clock speeds vary
            peaks[precision] = max(best, measure_peak_flops(args.device, precision, MATMUL_SIZE[args.device]))
    print_results(args, seconds, memory, flops, {name: peaks.get(p) for name, p in precisions.items()})


def print_results(args, seconds, memory, flops, peaks):
    """Print one JSON object per row to standard output, and a table to standard error."""
    flags = {name: value for name, value in vars(args).items() if name not in ("settings", "reference")}
    flags |= dict(threads=torch.get_num_threads(), torch=torch.__version__)
    widths = {key: max(9, len(key)) + 2 for key in COLUMNS}
    print(", ".join(f"{name} {value}" for name, value in flags.items()), file=sys.stderr)
    print(" " * 24 + "".join(f"{key:>{width}s}" for key, width in widths.items()), file=sys.stderr)
    for name, values in seconds.items():
        images_per_sec, peak = args.batch_size_per_gpu / statistics.median(values), peaks[name]
        record = dict(
            row=name, ms=1000 * statistics.median(values), ms_min=1000 * min(values), ms_max=1000 * max(values),
            images_per_sec=images_per_sec, peak_mib=memory[name] and memory[name] / 2**20,
            mfu=peak and flops * images_per_sec / peak, gflops_per_image=flops and flops / 1e9,
            peak_gflops=peak and peak / 1e9, ratio=args.reference and statistics.median(
                theirs / ours for theirs, ours in zip(seconds["reference"], values)))
        print(json.dumps(flags | record), flush=True)
        print(f"{name:24s}" + "".join(f"{'' if record[key] is None else format(record[key], COLUMNS[key]):>{width}s}"
                                      for key, width in widths.items()), file=sys.stderr)


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, ReferenceImplementationError)
