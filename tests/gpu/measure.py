"""What the tests measure on a device. Each function runs in a process of its own, see `measure` in conftest.py.

    python tests/gpu/stub.py FOLDER tests/gpu/measure.py count_step '{"precision": "bf16"}'

prints what the function returns, as JSON. Launches, copies and collectives are counted on the stub only.
"""

import collections
import functools
import json
import sys
import tempfile

import stub
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import train
import vit
from common.precision import autocast, set_matmul_precision
from data.loaders import build_multicrop, build_train_loader, iter_batch_keys, iter_on_device
from data.shapes import Shapes
from evaluation.knn import knn_classifier

TINY = "--arch vit_small --embed_dim 64 --num_heads 1 --out_dim 1024 --global_crops_size 64 --local_crops_size 32"


class Step:
    """The training step of train.py on random crops, with everything that it needs.

    Args:
        flags: of train.py, as one string.
        world_size: number of ranks that this process believes in; it is rank 0, and the others do not exist.
    """

    def __init__(self, flags=TINY, world_size=1):
        self.args = args = train.parse_args(f"--device cuda --compile false --batch_size_per_gpu 64 {flags}".split())
        device = torch.device("cuda", 0)
        if world_size > 1:
            dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=world_size)
        with device:  # initial weights are drawn there, which takes no time on the stub
            self.objects = train.build_training(args, device, world_size)
        set_matmul_precision(args.device, args.precision, self.student.backbone.embed_dim)
        self.wrapped = train.wrap_student(self.student, self.teacher, args, device, world_size)
        sizes = [args.global_crops_size] * 2 + [args.local_crops_size] * args.local_crops_number
        self.micro_batches = [[torch.randn(args.batch_size_per_gpu, 3, size, size, device=device) for size in sizes]
                              for _ in range(args.accum_steps)]
        self.finite, self.steps = torch.tensor(True, device=device), 0

    def __getattr__(self, name):
        return self.objects[name]

    def run(self, times=1, log=False):
        for _ in range(times):
            schedule = train.compute_schedule(self.steps, 1, self.args.batch_size_per_gpu, self.args)
            train.train_step(self.wrapped, self.teacher, self.dino_loss, self.optimizer, self.scaler,
                             self.micro_batches, schedule, self.args, self.finite, log)
            self.steps += 1


# ---- counts ----

def take_counts():
    return stub.take_counts() if stub.is_loaded() else {}


def summarize(counts):
    """Launches (kernels, products, copies), host syncs and pageable copies among some counts."""
    launches = ("kernel ", "gemm ", "conv ", "copy ", "memset")
    return dict(launches=sum(n for what, n in counts.items() if what.startswith(launches)),
                syncs=sum(n for what, n in counts.items() if what.startswith("sync ")),
                pageable=sum(n for what, n in counts.items() if what.startswith("copy ") and "pageable" in what))


def count_syncs(flags):
    """Host syncs and pageable copies of two steps, the second one logged. A sync that torch knows of raises."""
    step = Step(f"{TINY} {flags}")
    step.run(2)
    take_counts()
    torch.cuda.set_sync_debug_mode("error")
    step.run()
    step.run(log=True)
    torch.cuda.set_sync_debug_mode("default")
    return summarize(take_counts())


def count_launches(flags):
    """{phase: launches} of one step."""
    step, launches = Step(flags), collections.Counter()

    def count(phase):
        launches[phase] += summarize(take_counts())["launches"]

    def count_calls(thing, name, phase):
        function = getattr(thing, name)

        @functools.wraps(function)
        def counted(*args, **kwargs):
            count("rest")
            result = function(*args, **kwargs)
            count(phase)
            return result
        setattr(thing, name, counted)

    step.run(2)
    for thing, name, phase in ((step.teacher, "forward", "teacher forward"), (step.student, "forward", "forward"),
                               (step.dino_loss, "forward", "loss"), (torch.Tensor, "backward", "backward"),
                               (train, "clip_gradients", "clip"), (step.optimizer, "step", "optimizer"),
                               (step.dino_loss, "update_center", "center"), (train, "update_teacher", "EMA")):
        count_calls(thing, name, phase)
    take_counts()
    step.run()
    count("rest")
    return launches


def count_crops(flags):
    """Launches, host syncs and pageable copies of a batch of crops of photographs, made on the device or sent there.

    A sync that torch knows of raises.
    """
    args = train.parse_args(["--device", "cuda", "--batch_size_per_gpu", "64", *flags.split()])
    multicrop = build_multicrop(args, args.compile)
    sizes = [(500, 350 + i) if i % 3 else (350 + i, 500) for i in range(3 * args.batch_size_per_gpu)]
    images = [(Shapes("train", 1, 64)[0][0].resize(size), 0) for size in sizes]
    keys = iter_batch_keys(0, 3, len(images), args.seed, args.batch_size_per_gpu)
    loader = build_train_loader(images, multicrop, keys, args.seed, pin_memory=True)
    batches = iter_on_device(loader, multicrop, torch.device("cuda"))
    for _ in range(2):
        next(batches)
    take_counts()
    torch.cuda.set_sync_debug_mode("error")
    next(batches)
    torch.cuda.set_sync_debug_mode("default")
    return summarize(take_counts())


def count_syncs_of_runs(flags, data_paths):
    """Host syncs of whole runs of train.py on these folders of images, two to a batch."""
    syncs = []
    for data_path in data_paths:
        with tempfile.TemporaryDirectory() as folder:
            argv = [*f"{TINY} --device cuda --precision bf16 --batch_size_per_gpu 2 {flags}".split(),
                    "--data_path", data_path]
            take_counts()
            train.main(train.parse_args([*argv, "--output_dir", folder]))
            syncs.append(summarize(take_counts())["syncs"])
    return syncs


def count_collectives(flags, world_size):
    """Collectives of a step and their bytes, and the numbers of trained parameters and of prototypes."""
    step = Step(f"{TINY} {flags}", world_size)
    step.run(12)  # in the first steps DDP rebuilds its buckets and measures
    take_counts()
    step.run()
    counts = take_counts()
    return dict(syncs=summarize(counts)["syncs"], counts={k: n for k, n in counts.items() if "nccl" in k},
                parameters=sum(p.numel() for p in step.student.parameters() if p.requires_grad),
                out_dim=step.args.out_dim)


def count_products(precision):
    """{kind of matrix product: number} in the head, forward and backward, such as "gemm fp32 tf32"."""
    step = Step(f"{TINY} --precision {precision}")
    step.run()
    take_counts()
    with autocast("cuda", precision):
        logits = step.student.head(torch.randn(8, 64, device="cuda"))
    logits.sum().backward()
    return {what: n for what, n in take_counts().items() if what.startswith("gemm")}


def count_knn_products():
    """{kind of matrix product: number} of k-NN classification while TF32 is allowed."""
    torch.set_float32_matmul_precision("high")
    features, labels = torch.randn(64, 32), torch.arange(64) % 4
    take_counts()
    knn_classifier(features, labels, features, labels, ks=(5,), device="cuda")
    return {what: n for what, n in take_counts().items() if what.startswith("gemm")}


# ---- graphs, memory, attention ----

def count_graphs(flags):
    """Graphs and graph breaks of compiled steps."""
    step = Step(f"{TINY} --compile true {flags}")
    step.run(2)
    counters = torch._dynamo.utils.counters
    return dict(graphs=counters["stats"]["unique_graphs"], breaks=counters["graph_break"])


def measure_memory(flags):
    """Peak memory of a step in GiB."""
    step = Step(flags)
    step.run(2)
    torch.cuda.reset_peak_memory_stats()
    step.run()
    return torch.cuda.max_memory_allocated() / 2**30


class AttentionRecorder(TorchDispatchMode):
    """Records the shapes [B, heads, Q, d] and [B, heads, N, d] of queries and keys that fused attention is given."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "scaled_dot_product" in function.name():
            names = [argument.name for argument in function._schema.arguments]
            query, key = (args[names.index(name)] for name in ("query", "key"))
            self.calls.append((function.name(), list(query.shape), list(key.shape)))
        return function(*args, **kwargs or {})


def record_attention(precision):
    """Fused attention of a ViT in training and in every way to evaluate it, and the backends that torch chooses.

    Returns:
        calls: [name of the operation, shape of the queries, shape of the keys] for each.
        choices: for each pair of shapes, the value of torch.nn.attention.SDPBackend.
    """
    with torch.device("cuda"):
        model = vit.vit_small(drop_path_rate=0.1)
    crops = [torch.randn(4, 3, size, size, device="cuda") for size in (224, 96)]
    with AttentionRecorder() as recorder, autocast("cuda", precision):
        sum(model(x).float().sum() for x in crops).backward()
        with torch.no_grad():
            for x in crops:
                model.eval()(x)
                model.forward_with_attention(x)
                model.get_last_selfattention(x)
                model.get_intermediate_layers(x, 4)
    torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default
    dtype, choices = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[precision], {}
    for shapes in {(tuple(query), tuple(key)) for _, query, key in recorder.calls}:
        q, k = (torch.empty(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes)
        choices[f"{shapes}"] = torch._fused_sdp_choice(q, k, k)
    return dict(calls=recorder.calls, choices=choices)


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
