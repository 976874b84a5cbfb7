import itertools
import json
import sys
from argparse import Namespace

import pytest
import torch
from torchvision import transforms

import train
from benchmarks import checkout, reference
from benchmarks.checkout import ReferenceImplementationError
from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from common.weights import load_backbone
from data.datasets import open_data
from data.loaders import iter_batch_keys

SMALL = ("--data_path shapes:32 --arch vit_tiny --embed_dim 64 --depth 1 --num_heads 2 --patch_size 8 --out_dim 64 "
         "--hidden_dim 32 --global_crops_size 32 --local_crops_size 16 --local_crops_number 2 "
         "--local_crops_scale 0.2 0.5 --blur 0.5 0.25 0 --blur_radius 0.5 1 --color_jitter 0.1 0.2 0.3 0.05 "
         "--epochs 2 --warmup_epochs 1 --batch_size_per_gpu 16 --knn_every 1 --knn_images 300 --num_workers 0 "
         "--log_every 5 --device cpu --precision fp32").split()


@pytest.fixture
def run(tmp_path):
    """run(*flags): the folder of a run of train.py, with its checkpoint."""
    def run(*flags, global_batch_size=16, num_images=10_000):
        folder = tmp_path / "run"
        folder.mkdir()
        args = train.parse_args([*SMALL, "--output_dir", str(folder), *flags])
        save_checkpoint(folder / "checkpoint.pth", flags=vars(args),
                        fixed=dict(global_batch_size=global_batch_size, num_images=num_images, shuffle="full"))
        return folder
    return run


def test_flags_are_those_of_the_run(run):
    folder = run("--data_path", "2024", num_images=7)
    flags, num_images = reference.load_flags(folder)
    expected = train.parse_args([*SMALL, "--output_dir", str(folder), "--data_path", "2024"])
    assert vars(flags) == vars(expected) and num_images == 7


@pytest.mark.parametrize("flags, unsupported", [
    ("--loss mse", "--loss mse"), ("--teacher student", "--teacher student"), ("--predictor true", "--predictor True"),
    ("--centering sinkhorn --accum_steps 2", "--centering sinkhorn, --accum_steps 2"),
    ("--clip_mode global", "--clip_mode global"),
    ("--channels 3 --rotate90", "--channels 3, --normalization measure, --rotate90 True"),
    ("--normalization .5 .5 .5 .2 .2 .2", "--normalization 0.5 0.5 0.5 0.2 0.2 0.2"),
    ("--vertical_flip --layer_decay 0.9", "--layer_decay 0.9, --vertical_flip True"),
    ("--batch_size_per_gpu 8", "more than one process"),
    ("--schedule_epochs 2", "--schedule_epochs 2"),
    ("--warmup_teacher_temp_epochs 3", "--warmup_teacher_temp_epochs above --epochs")])
def test_unsupported_flags(run, flags, unsupported):
    with pytest.raises(ReferenceImplementationError, match=f"does not support {unsupported}"):
        reference.load_flags(run(*flags.split()))


def test_not_a_run_or_not_a_checkout(tmp_path, run):
    with pytest.raises(CheckpointError, match="no such file"):
        reference.load_flags(tmp_path)
    torch.save([1], tmp_path / "checkpoint.pth")
    with pytest.raises(ReferenceImplementationError, match="not a run of train.py"):
        reference.load_flags(tmp_path)
    args = reference.parse_args([str(tmp_path), "--like", str(run()), "--output_dir", str(tmp_path / "new")])
    with pytest.raises(ReferenceImplementationError, match="no checkout of facebookresearch/dino"):
        reference.main(args)
    assert not (tmp_path / "new").exists()
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pth")
    for name, value in (("arch", "resnet18"), ("device", "mps")):
        save_checkpoint(tmp_path / "run" / "checkpoint.pth", **state | {"flags": state["flags"] | {name: value}})
        with pytest.raises(ReferenceImplementationError, match=f"does not support --{name} {value}"):
            reference.load_flags(tmp_path / "run")


def test_order_of_images_is_that_of_train():
    for shuffle, epoch in itertools.product(("full", "randperm"), (0, 1)):
        sampler = reference.EpochSampler(11, Namespace(batch_size_per_gpu=3, seed=5, shuffle=shuffle))
        sampler.set_epoch(epoch)
        keys = [key for batch in iter_batch_keys(3 * epoch, 3 * epoch + 3, 11, 5, 3, shuffle=shuffle) for key in batch]
        assert list(sampler) == keys and len(sampler) == 9
        assert {e for e, _ in keys} == {epoch}


class Blur:
    """The attributes of the reference implementation's."""

    def __init__(self):
        self.prob, self.radius_min, self.radius_max = 0.5, 0.1, 2.0


class Augmentation:
    """torchvision transforms in the structure of the reference implementation's."""

    def __init__(self, global_scale, local_scale, count):
        def kind(size, scale):
            jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
            color = transforms.Compose([transforms.RandomHorizontalFlip(), jitter, transforms.RandomGrayscale(0.2)])
            return transforms.Compose([transforms.RandomResizedCrop(size, scale), color, Blur(), None])
        self.global_transfo1, self.global_transfo2 = kind(224, global_scale), kind(224, global_scale)
        self.local_transfo, self.local_crops_number = kind(96, local_scale), count


def test_augmentation_follows_the_flags(run):
    flags, _ = reference.load_flags(run())
    augmentation = checkout.build_augmentation(Augmentation, flags, (0.4, 1.0), (0.2, 0.5), 2)
    transfos = augmentation.global_transfo1, augmentation.global_transfo2, augmentation.local_transfo
    assert augmentation.local_crops_number == 2
    for transform, size, scale, p in zip(transfos, (32, 32, 16), [(0.4, 1.0)] * 2 + [(0.2, 0.5)], (0.5, 0.25, 0.0)):
        crop, color, blur, _ = transform.transforms
        expected = transforms.ColorJitter(0.1, 0.2, 0.3, 0.05)
        jitter = color.transforms[1].transforms[0]
        assert crop.size == (size, size) and crop.scale == scale
        assert (blur.prob, blur.radius_min, blur.radius_max) == (p, 0.5, 1)
        for name in ("brightness", "contrast", "saturation", "hue"):
            assert tuple(getattr(jitter, name)) == pytest.approx(tuple(getattr(expected, name)))


def test_attributes_are_replaced_within_the_context_only():
    layer, owner = torch.nn.Linear(1, 1), Namespace()
    before = torch.nn.Module.cuda
    with checkout.patch_all([(torch.nn.Module, "cuda", lambda self: self), (owner, "print", list)]):
        assert layer.cuda() is layer and owner.print() == []
    assert torch.nn.Module.cuda is before and not vars(owner)
    with pytest.raises(AttributeError), checkout.patch_all([(torch.nn.Module, "cuda", None), (owner, "other", None)]):
        pass
    assert torch.nn.Module.cuda is before


MAIN = """
import torch
from torch import nn
from torchvision import datasets
import utils
import vision_transformer as vits
from tests.benchmarks.test_reference import Augmentation

class DataAugmentationDINO(Augmentation):
    def __call__(self, image):
        transfos = [self.global_transfo1, self.global_transfo2] + [self.local_transfo] * self.local_crops_number
        return [torch.full((3, *transfo.transforms[0].size), image.getpixel((9, 9))[0] / 255) for transfo in transfos]

class DINOHead(nn.Linear):
    def __init__(self, embed_dim, out_dim, use_bn, norm_last_layer, nlayers, hidden_dim, bottleneck_dim):
        super().__init__(embed_dim, out_dim)
        utils.seen["head"] = nlayers, hidden_dim, bottleneck_dim, use_bn, norm_last_layer

class DINOLoss(nn.Module):
    def __init__(self, out_dim, crops, student_temp, center_momentum):
        super().__init__()
        utils.seen["loss"] = out_dim, crops, student_temp, center_momentum

    def forward(self, output):
        return output.square().mean()

def train_one_epoch(student, teacher, teacher_without_ddp, dino_loss, data_loader, optimizer, lr_schedule, wd_schedule,
                    momentum_schedule, epoch, fp16_scaler, args):
    metric_logger = utils.MetricLogger()
    for i, (images, _) in enumerate(metric_logger.log_every(data_loader, 10, "Epoch")):
        print(i)
        utils.seen["crops"].append([(*crop.shape, round(crop.mean().item(), 4)) for crop in images])
        loss = dino_loss(student.module.head(student.module.backbone(images[0].cuda())))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        metric_logger.update(loss=loss.item(), lr=optimizer.param_groups[0]["lr"], wd=0.04)
    metric_logger.synchronize_between_processes()
    return {}

def train_dino(args):
    utils.init_distributed_mode(args)
    images = datasets.ImageFolder(args.data_path, transform=DataAugmentationDINO(
        args.global_crops_scale, args.local_crops_scale, args.local_crops_number))
    sampler = torch.utils.data.DistributedSampler(images, shuffle=True)
    loader = torch.utils.data.DataLoader(images, args.batch_size_per_gpu, sampler=sampler, drop_last=True)
    backbone = vits.__dict__[args.arch](patch_size=args.patch_size, drop_path_rate=args.drop_path_rate)
    network = nn.Sequential()
    network.backbone = backbone
    network.head = DINOHead(64, args.out_dim, use_bn=args.use_bn_in_head, norm_last_layer=args.norm_last_layer)
    student = nn.parallel.DistributedDataParallel(network.cuda(), device_ids=[args.gpu])
    assert not utils.has_batchnorms(student)
    utils.restart_from_checkpoint(None, run_variables={}, student=student, teacher=network, fp16_scaler=None)
    loss = DINOLoss(args.out_dim, args.local_crops_number + 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=args.lr)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        train_one_epoch(student, network, network, loss, loader, optimizer, None, None, None, epoch, None, args)
    torch.save({"teacher": network.state_dict()}, args.output_dir + "/checkpoint.pth")
"""
VITS = """
import vit

class VisionTransformer(vit.VisionTransformer):
    def __init__(self, img_size, mlp_ratio, qkv_bias, norm_layer, **sizes):
        super().__init__(*img_size, **sizes)
        assert mlp_ratio == 4 and qkv_bias and norm_layer(8).eps == 1e-6

def vit_small():
    assert False
"""
UTILS = """
from types import SimpleNamespace

seen = dict(crops=[])

class MetricLogger:
    def __init__(self):
        self.meters = {}

    def update(self, **values):
        self.meters = {name: SimpleNamespace(value=value) for name, value in values.items()}

    def log_every(self, loader, print_freq, header):
        assert False

    def synchronize_between_processes(self):
        assert False

def init_distributed_mode(args):
    assert False

def has_batchnorms(network):
    return True

def restart_from_checkpoint(path, run_variables, **objects):
    assert False
"""


def test_stand_in_trains_with_the_flags_of_a_run(small_shapes, run, tmp_path, monkeypatch, capsys):
    """With our own modules under the reference's names: all replacements arrive, and are undone."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name, text in zip(checkout.MODULES, (MAIN, UTILS, VITS)):
        (folder / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = torch.utils.data.DistributedSampler, torch.nn.parallel.DistributedDataParallel, torch.Tensor.cuda
    try:
        reference.main(reference.parse_args([str(folder), "--like", str(run(num_images=300)), "--output_dir",
                                             str(tmp_path / "theirs")]))
        seen = sys.modules["utils"].seen
        assert "print" not in vars(sys.modules["main_dino"]) and str(folder) not in sys.path
    finally:
        for name in checkout.MODULES:
            sys.modules.pop(name, None)
    assert before == (torch.utils.data.DistributedSampler, torch.nn.parallel.DistributedDataParallel, torch.Tensor.cuda)
    assert seen["head"] == (3, 32, 256, False, True) and seen["loss"] == (64, 4, 0.1, 0.9)
    images = open_data("shapes:32").train
    batches = list(iter_batch_keys(0, 36, 300, 0, 16))
    assert len(seen["crops"]) == len(batches) == 36
    for crops, batch in zip(seen["crops"], batches):
        value = sum(images[index][0].getpixel((9, 9))[0] / 255 for _, index in batch) / 16
        assert crops == [(16, 3, size, size, pytest.approx(value, abs=1e-4)) for size in (32, 32, 16, 16)]
    records = [json.loads(line) for line in (tmp_path / "theirs" / "log.jsonl").read_text().splitlines()]
    assert [record.get("eval", record.get("step")) for record in records] == [
        "raw pixels", "untrained backbone", 4, 9, 14, 17, "epoch 0", 19, 24, 29, 34, 35, "epoch 1"]
    for record in records:
        if "eval" in record:
            assert record.keys() - {"rankme"} == {"eval", "knn_top1", "knn_top5"}
            assert ("rankme" in record) == (record["eval"] != "raw pixels")
        else:
            assert record.keys() == {"epoch", "step", "loss", "lr", "wd", "images_per_sec", "data_time", "step_time",
                                     "eta"}
            assert record["loss"] > 0 and record["lr"] == 0.0005 and record["epoch"] == record["step"] // 18
    output = capsys.readouterr().out
    assert "k-NN of epoch 1: top-1" in output and "epoch 1/2 [36/36] loss" in output
    weights = load_checkpoint(tmp_path / "theirs" / "checkpoint.pth")["teacher"]
    backbone, info = load_backbone(str(tmp_path / "theirs" / "teacher.safetensors"))
    assert all(torch.equal(x, weights[f"backbone.{name}"]) for name, x in backbone.state_dict().items())
    assert info["image_size"] == 32 and info["network"] == "teacher" and backbone.num_heads == 2


def test_checkout_trains_like_a_run(tmp_path, request, small_shapes):
    """With --reference only, because this repository holds nothing of the reference implementation."""
    folder_of_it = request.config.getoption("--reference")
    if folder_of_it is None:
        pytest.skip("needs --reference DIR, a checkout of facebookresearch/dino")
    folder = tmp_path / "run"
    train.main(train.parse_args([*SMALL, "--linear_probe", "--output_dir", str(folder)]))
    args = reference.parse_args([folder_of_it, "--like", str(folder), "--output_dir", str(tmp_path / "theirs")])
    reference.main(args)
    ours, theirs = ([json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
                    for path in (folder, tmp_path / "theirs"))
    assert [record.get("eval", record.get("step")) for record in ours] == [
        record.get("eval", record.get("step")) for record in theirs]
    for our, their in zip(ours, theirs):
        assert their.keys() <= our.keys()
        if "loss" in their:
            for name in ("lr", "wd"):
                assert their[name] == pytest.approx(our[name], rel=1e-6), name
            assert their["loss"] == pytest.approx(our["loss"], abs=0.2)  # other weights, other crops
    weights = load_backbone(str(tmp_path / "run" / "teacher.safetensors"))[0].state_dict()
    found, info = load_backbone(str(tmp_path / "theirs" / "teacher.safetensors"))
    assert {name: x.shape for name, x in found.state_dict().items()} == {name: x.shape for name, x in weights.items()}
    assert found.num_heads == 2 and info["data_path"] == "shapes:32"
    state = load_checkpoint(tmp_path / "theirs" / "checkpoint.pth")["teacher"]
    assert all(torch.equal(x, state[f"backbone.{name}"]) for name, x in found.state_dict().items())
    with pytest.raises(ReferenceImplementationError, match="holds a run already"):
        reference.main(args)
