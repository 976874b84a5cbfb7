"""Crops and training steps of one library, timed on request: the processes of benchmarks.peers.

    python benchmarks/peer_worker.py lightly '{"out_dim": 65536, "batch_size_per_gpu": 8, ...}'

Runs under the python of that library and needs only torch and the library; `ours` and `reference` import this
repository. The settings are the flags of train.py and of benchmarks.peers, and `schedule`, the values of a step in
mid-training. Each line of standard input is a task, crops or train; each answer is a line of JSON on standard output.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import time

import torch

PACKAGES = {
    "lightly": "lightly timm", "lightly-train": "lightly-train timm", "stable-pretraining": "stable-pretraining"}
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Turns:
    """Times a training loop, one turn of `steps` steps per task.

    The loop calls begin() before its first batch, start_step() with a batch on the device, and end_step() after a step.
    """

    def __init__(self, settings, version):
        self.settings, self.version = settings, version
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print

    def begin(self, loader, finish=lambda batch: batch):
        """Answer with versions, then wait for a task. `finish` completes the crops of a batch on the device."""
        self.loader, self.finish, self.batches = loader, finish, itertools.cycle(loader.batch_sampler)
        self.answer(version=self.version, torch=torch.__version__, precision=self.settings.precision)
        self.wait()

    def wait(self):
        """Answer tasks until one is to train."""
        while (task := sys.stdin.readline().strip()) == "crops":
            set_threads(1)  # as in a data loader worker
            start = self.now()
            for keys in itertools.islice(self.batches, self.settings.steps):
                self.finish(self.loader.collate_fn([self.loader.dataset[key] for key in keys]))
            self.answer(crops=self.now() - start)
            set_threads(self.settings.threads)
        if task != "train":  # standard input was closed
            os._exit(0)
        self.marks, self.losses, self.start = [], [], self.now()

    def start_step(self):
        self.marks.append(self.mark())

    def end_step(self, loss):
        self.marks.append(self.mark())
        self.losses.append(loss)
        if len(self.losses) == self.settings.steps:
            both = self.now() - self.start
            step = sum(itertools.starmap(seconds_between, zip(self.marks[::2], self.marks[1::2])))
            self.answer(step=step, both=both, loss=float(self.losses[0]), **peak_memory())
            self.wait()

    def now(self):
        if self.settings.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self):
        """The time, on CUDA that of the stream, without waiting for it."""
        if self.settings.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def answer(self, **values):
        print(json.dumps(values), file=self.answers, flush=True)

    def as_callback(self, *kinds):
        """The same as a Lightning callback; `kinds` has the Callback of pytorch_lightning or of lightning."""
        class TimedLoop(*kinds):
            def on_train_start(_, trainer, module):
                self.begin(trainer.train_dataloader)

            def on_train_batch_start(_, *args):
                self.start_step()

            def on_train_batch_end(_, trainer, module, outputs, *args):
                self.end_step(outputs["loss"])
        return TimedLoop()


def seconds_between(start, end):
    """Seconds between two values of Turns.mark."""
    return start.elapsed_time(end) / 1000 if isinstance(start, torch.cuda.Event) else end - start


def set_threads(number):
    torch.set_num_threads(number)
    if hasattr(sys.modules.get("cv2"), "setNumThreads"):
        sys.modules["cv2"].setNumThreads(number)


def peak_memory():
    """Peak of the resident memory of this process, and of what torch allocated on the GPU, in MiB; None if unknown."""
    try:
        import resource
    except ImportError:  # on Windows
        resident = None
    else:
        unit = 2**20 if sys.platform == "darwin" else 2**10
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return dict(peak_mib=resident, gpu_mib=torch.cuda.max_memory_allocated() / 2**20 or None)


def vit_arguments(s):
    """Arguments of timm's VisionTransformer for the backbone of the flags."""
    return dict(img_size=s.global_crops_size, patch_size=s.patch_size, embed_dim=s.embed_dim, depth=s.depth,
                num_heads=s.num_heads, num_classes=0, dynamic_img_size=True)


def trainer_arguments(s):
    """Arguments of a Lightning Trainer; one epoch has all images of the measurement."""
    return dict(accelerator={"cuda": "gpu"}.get(s.device, s.device), devices=1, enable_progress_bar=False,
                enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0)


def lightning_precision(s):
    return {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[s.precision]


# ---- one function per library ----

def train_ours(s, turns):
    from benchmarks import speed
    from data.folders import ImageFolder
    from data.loaders import build_multicrop, build_train_loader, iter_on_device

    code = speed.Ours(s, s.precision + "+compile" * s.compile + "+checkpointing" * s.activation_checkpointing)
    code.set_precision()
    objects, multicrop, device = code.build_training(), build_multicrop(s, s.compile), torch.device(s.device)
    images, B = ImageFolder(s.folder), s.batch_size_per_gpu
    keys = [[(0, i + j) for j in range(B)] for i in range(0, len(images) - B + 1, B)]
    loader = build_train_loader(images, multicrop, keys, s.seed, s.num_workers, s.device == "cuda")
    turns.begin(loader, lambda batch: next(iter_on_device([batch], multicrop, device)))
    for crops, _, _ in iter_on_device(loader, multicrop, device):
        turns.start_step()
        turns.end_step(code.step(crops, **objects)[0])


def train_reference(s, turns):
    from torchvision.datasets import ImageFolder

    from benchmarks import checkout, speed

    s.task = "step"
    code = speed.Reference(s)
    code.set_precision()
    s.precision = code.args.precision  # which is not every one
    with checkout.patch_all(code.patches):
        objects = code.build_training()
        transform = code.main_dino.DataAugmentationDINO(s.global_crops_scale, s.local_crops_scale, s.local_crops_number)
        loader = torch.utils.data.DataLoader(ImageFolder(s.folder, transform), s.batch_size_per_gpu, drop_last=True,
                                             num_workers=s.num_workers, pin_memory=s.device == "cuda")
        turns.begin(loader)
        for crops, _ in loader:
            turns.start_step()
            turns.end_step(code.step(crops, **objects))


def train_lightly(s, turns):
    """As in its ImageNet benchmark of DINO: one backbone pass per crop size, timm's ViT, AdamW."""
    import timm
    from lightly.data import LightlyDataset
    from lightly.data.multi_view_collate import MultiViewCollate
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM
    from lightly.models.utils import deactivate_requires_grad, get_weight_decay_parameters, update_momentum
    from lightly.transforms import DINOTransform

    def build_network(drop_path_rate):
        vit = timm.create_model("vit_small_patch16_224", **vit_arguments(s), drop_path_rate=drop_path_rate)
        head = DINOProjectionHead(s.embed_dim, s.hidden_dim, s.bottleneck_dim, s.out_dim, s.use_bn_in_head,
                                  norm_last_layer=s.norm_last_layer)
        return torch.nn.Sequential(MaskedVisionTransformerTIMM(vit), head).to(s.device)

    torch.manual_seed(s.seed)
    student, teacher = build_network(s.drop_path_rate), build_network(0.0)
    teacher.load_state_dict(student.state_dict())
    deactivate_requires_grad(teacher)
    dino_loss = DINOLoss(s.out_dim).to(s.device)
    matrices, others = get_weight_decay_parameters([student])
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=s.schedule["weight_decay"]),
                                   dict(params=others, weight_decay=0.0)], lr=s.schedule["lr"])
    scaler = torch.amp.GradScaler(s.device, enabled=s.precision == "fp16")
    dtype = torch.float16 if s.precision == "fp16" else torch.bfloat16
    transform = DINOTransform(s.global_crops_size, s.global_crops_scale, s.local_crops_size, s.local_crops_scale,
                              s.local_crops_number)
    loader = torch.utils.data.DataLoader(
        LightlyDataset(s.folder, transform=transform), s.batch_size_per_gpu, drop_last=True,
        collate_fn=MultiViewCollate(), num_workers=s.num_workers, pin_memory=s.device == "cuda")

    turns.begin(loader)
    for crops, _, _ in loader:
        crops = [crop.to(s.device, non_blocking=True) for crop in crops]
        turns.start_step()
        update_momentum(student, teacher, s.schedule["momentum"])
        with torch.autocast(s.device, dtype, enabled=s.precision != "fp32"):
            with torch.no_grad():
                targets = teacher(torch.cat(crops[:2]))
            groups = [crops[:2], crops[2:]] if s.local_crops_number else [crops]
            logits = torch.cat([student(torch.cat(group)) for group in groups])
            loss = dino_loss(targets.chunk(2), logits.chunk(len(crops)), teacher_temp=s.schedule["teacher_temp"])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(student.parameters(), s.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        turns.end_step(loss.detach())


def train_lightly_train(s, turns):
    """Its pretrain function, with AdamW, because its default for DINO is SGD."""
    # it reports its use otherwise, and leaves files in the home folder when it is killed
    os.environ |= {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "LIGHTLY_TRAIN_CACHE_DIR": os.getcwd()}
    import lightly_train
    from pytorch_lightning import Callback

    def crop(size, scale):
        return {"random_resize": dict(min_scale=scale[0], max_scale=scale[1])} | size

    local = crop(dict(num_views=s.local_crops_number, view_size=(s.local_crops_size,) * 2), s.local_crops_scale)
    arguments = trainer_arguments(s)
    lightly_train.pretrain(
        out="lightly-train", data=s.folder, model="timm/vit_small_patch16_224", method="dino",
        model_args=vit_arguments(s) | dict(drop_path_rate=s.drop_path_rate), epochs=1, batch_size=s.batch_size_per_gpu,
        num_workers=s.num_workers, seed=s.seed, optim="adamw", precision=lightning_precision(s),
        accelerator=arguments.pop("accelerator"), devices=arguments.pop("devices"), loader_args=dict(shuffle=False),
        # a string, because it logs its arguments as JSON
        trainer_args=arguments | dict(callbacks=[turns.as_callback(Callback, str)], logger=False),
        method_args=dict(output_dim=s.out_dim, hidden_dim=s.hidden_dim, bottleneck_dim=s.bottleneck_dim,
                         batch_norm=s.use_bn_in_head, norm_last_layer=s.norm_last_layer,
                         teacher_temp=s.schedule["teacher_temp"], warmup_teacher_temp=s.schedule["teacher_temp"]),
        transform_args=crop(dict(image_size=(s.global_crops_size,) * 2), s.global_crops_scale)
        | dict(local_view=local if s.local_crops_number else None))


def train_stable_pretraining(s, turns):
    """Its Manager and DINO, with the crops of its ImageNet-100 benchmark, without the probes."""
    import stable_pretraining as spt
    from lightning.pytorch import Callback, Trainer
    from stable_pretraining.data import transforms as T
    from stable_pretraining.methods.dino import DINO
    from torchvision.datasets import ImageFolder

    spt.set(cache_dir=os.getcwd())  # of its logs, otherwise in the home folder

    class MultiCropDINO(DINO):
        def forward(self, batch, stage):
            views = {kind: [view["image"] for name, view in batch.items() if name.startswith(kind)]
                     for kind in ("global", "local")}
            return {"loss": super().forward(views["global"], views["local"]).loss}

    def build_view(size, scale, blur, solarize=0.0):
        return T.Compose(
            T.RGB(), T.RandomResizedCrop((size, size), scale=scale),
            T.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8), T.RandomGrayscale(p=0.2),
            T.PILGaussianBlur(p=blur), *[T.RandomSolarize(threshold=128, p=solarize)] * (solarize > 0),
            T.RandomHorizontalFlip(p=0.5), T.ToImage(**spt.data.static.ImageNet))

    views = {f"global_{i}": build_view(s.global_crops_size, s.global_crops_scale, *strengths)
             for i, strengths in enumerate([(1.0,), (0.1, 0.2)])}
    views |= {f"local_{i}": build_view(s.local_crops_size, s.local_crops_scale, 0.5)
              for i in range(s.local_crops_number)}
    images = spt.data.FromTorchDataset(ImageFolder(s.folder), ["image", "label"], T.MultiViewTransform(views))
    loader = torch.utils.data.DataLoader(images, s.batch_size_per_gpu, drop_last=True, num_workers=s.num_workers,
                                         pin_memory=s.device == "cuda")
    module = MultiCropDINO("vit_small_patch16_224", s.hidden_dim, s.bottleneck_dim, s.out_dim,
                           temperature_teacher=s.schedule["teacher_temp"], encoder_kwargs=vit_arguments(s))
    module.optim = dict(optimizer=dict(type="AdamW", lr=s.schedule["lr"], weight_decay=s.schedule["weight_decay"]),
                        scheduler=dict(type="LinearWarmupCosineAnnealing"), interval="epoch")
    trainer = Trainer(max_epochs=1, logger=False, precision=lightning_precision(s), gradient_clip_val=s.clip_grad,
                      callbacks=[spt.callbacks.TeacherStudentCallback(update_after_backward=True),
                                 turns.as_callback(Callback)], **trainer_arguments(s))
    spt.Manager(trainer=trainer, module=module, data=spt.data.DataModule(train=loader), seed=s.seed)()


LOOPS = {"ours": train_ours, "reference": train_reference, "lightly": train_lightly,
         "lightly-train": train_lightly_train, "stable-pretraining": train_stable_pretraining}


def read_version(name, s):
    """Version of a package, or commit of this repository or of the checkout of the reference implementation."""
    if name in PACKAGES:
        return importlib.metadata.version(name)
    command = ["git", "-C", ROOT if name == "ours" else s.reference, "describe", "--always", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None  # None without git


def read_settings(text):
    """The flags that peers.py has written as JSON, with tuples again in place of lists."""
    return argparse.Namespace(**{name: tuple(value) if isinstance(value, list) else value
                                 for name, value in json.loads(text).items()})


def main(name, settings):
    s = read_settings(settings)
    set_threads(s.threads)
    if name in PACKAGES and s.device == "cuda" and s.precision != "fp32":
        torch.set_float32_matmul_precision("high")  # TF32, as in ours and as Lightning recommends
    LOOPS[name](s, Turns(s, read_version(name, s)))


if __name__ == "__main__":
    main(*sys.argv[1:])
