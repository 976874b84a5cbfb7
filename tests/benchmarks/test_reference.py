import json
import sys
from argparse import Namespace

import pytest
import torch
from torchvision import transforms

import train
from benchmarks import checkout, reference
from common.checkpoint import load_checkpoint, save_checkpoint
from common.weights import CheckpointError, load_backbone
from data import datasets as data
from data.loaders import iter_batch_keys

SMALL = ("--data_path shapes:32 --arch vit_tiny --embed_dim 64 --depth 1 --num_heads 2 --patch_size 8 --out_dim 64 "
         "--hidden_dim 32 --global_crops_size 32 --local_crops_size 16 --local_crops_number 2 "
         "--local_crops_scale 0.2 0.5 --blur 0.5 0.25 0 --blur_radius 0.5 1 --color_jitter 0.1 0.2 0.3 0.05 "
         "--epochs 2 --warmup_epochs 1 --batch_size_per_gpu 16 --knn_every 1 --knn_images 300 --num_workers 0 "
         "--log_every 5 --device cpu --precision fp32").split()


@pytest.fixture
def run(tmp_path):
    """run(*flags): the folder of a run of train.py that wrote its flags down."""
    def run(*flags, batch=16, pictures=10_000):
        folder = tmp_path / "run"
        folder.mkdir()
        args = train.parse_args([*SMALL, "--output_dir", str(folder), *flags])
        save_checkpoint(folder / "checkpoint.pth", flags=vars(args),
                   fixed={"global batch": batch, "number of pictures": pictures})
        return folder
    return run


def test_flags_are_those_of_the_run(run):
    folder = run("--data_path", "2024", pictures=7)
    flags, pictures = reference.flags_of(folder)
    expected = train.parse_args([*SMALL, "--output_dir", str(folder), "--data_path", "2024"])
    assert vars(flags) == vars(expected) and pictures == 7


@pytest.mark.parametrize("flags, named", [
    ("--loss mse", "the reference has no --loss mse"), ("--teacher student", "the reference has no --teacher student"),
    ("--predictor true", "--predictor True"), ("--centering sinkhorn", "--centering sinkhorn"),
    ("--accum_steps 2", "--accum_steps 2"), ("--clip_mode global", "--clip_mode global"),
    ("--batch_size_per_gpu 8", "several processes trained it"),
    ("--warmup_teacher_temp_epochs 3", "no --warmup_teacher_temp_epochs beyond --epochs")])
def test_what_the_reference_cannot_do(run, flags, named):
    with pytest.raises(reference.NoReference, match=named):
        reference.flags_of(run(*flags.split()))


def test_what_is_no_run_or_no_checkout(tmp_path, run):
    with pytest.raises(CheckpointError, match="no such file"):
        reference.flags_of(tmp_path)
    torch.save([1], tmp_path / "checkpoint.pth")
    with pytest.raises(reference.NoReference, match="no run of train.py"):
        reference.flags_of(tmp_path)
    args = reference.parse_args([str(tmp_path), "--like", str(run()), "--output_dir", str(tmp_path / "new")])
    with pytest.raises(reference.NoReference, match="no checkout of facebookresearch/dino"):
        reference.main(args)
    assert not (tmp_path / "new").exists()
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pth")
    for name, value, words in (("arch", "resnet18", "not with resnet18"), ("device", "mps", "cannot run on mps here")):
        save_checkpoint(tmp_path / "run" / "checkpoint.pth", **state | {"flags": state["flags"] | {name: value}})
        with pytest.raises(reference.NoReference, match=words):
            reference.flags_of(tmp_path / "run")


def test_pictures_come_in_the_order_of_train():
    flags = Namespace(batch_size_per_gpu=3, seed=5)
    order = reference.Order(range(11), flags)
    for epoch in (0, 1):
        order.set_epoch(epoch)
        expected = [index for batch in iter_batch_keys(3 * epoch, 3 * epoch + 3, 11, 5, 3) for _, index in batch]
        assert list(order) == expected and len(order) == len(expected) == 9
        assert {e for batch in iter_batch_keys(3 * epoch, 3 * epoch + 3, 11, 5, 3) for e, _ in batch} == {epoch}


class Blur:
    """With the attributes of the reference's."""

    def __init__(self):
        self.prob, self.radius_min, self.radius_max = 0.5, 0.1, 2.0


class Augmentation:
    """Built as the reference builds its own, of torchvision's transforms."""

    def __init__(self, global_scale, local_scale, count):
        def kind(size, scale):
            jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
            colors = transforms.Compose([transforms.RandomHorizontalFlip(), jitter, transforms.RandomGrayscale(0.2)])
            return transforms.Compose([transforms.RandomResizedCrop(size, scale), colors, Blur(), None])
        self.global_transfo1, self.global_transfo2 = kind(224, global_scale), kind(224, global_scale)
        self.local_transfo, self.local_crops_number = kind(96, local_scale), count


def test_views_are_of_the_flags(run):
    flags, _ = reference.flags_of(run())
    made = reference.views(Augmentation, flags)
    kinds = made.global_transfo1, made.global_transfo2, made.local_transfo
    assert made.local_crops_number == 2
    for kind, size, scale, p in zip(kinds, (32, 32, 16), [(0.4, 1.0)] * 2 + [(0.2, 0.5)], (0.5, 0.25, 0.0)):
        crop, colors, blur, _ = kind.transforms
        new = transforms.ColorJitter(0.1, 0.2, 0.3, 0.05)  # what torchvision makes of these strengths
        jitter = colors.transforms[1].transforms[0]
        assert crop.size == (size, size) and crop.scale == scale
        assert (blur.prob, blur.radius_min, blur.radius_max) == (p, 0.5, 1)
        for name in ("brightness", "contrast", "saturation", "hue"):
            assert tuple(getattr(jitter, name)) == pytest.approx(tuple(getattr(new, name)))


def test_device_calls_stay_only_while_asked():
    before = torch.Tensor.cuda, torch.nn.Module.cuda, torch.cuda.synchronize
    x, layer = torch.ones(1), torch.nn.Linear(1, 1)
    with checkout.stub_cuda_calls("cpu"):
        assert x.cuda(non_blocking=True) is x and layer.cuda() is layer and torch.cuda.synchronize() is None
    assert (torch.Tensor.cuda, torch.nn.Module.cuda, torch.cuda.synchronize) == before


MAIN = """
import torch
from torch import nn
from torchvision import datasets
import utils
import vision_transformer as vits
from tests.benchmarks.test_reference import Augmentation

class DataAugmentationDINO(Augmentation):
    def __call__(self, image):
        kinds = [self.global_transfo1, self.global_transfo2] + [self.local_transfo] * self.local_crops_number
        return [torch.full((3, *kind.transforms[0].size), image.getpixel((9, 9))[0] / 255) for kind in kinds]

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

def train_one_epoch(student, teacher, bare, loss, loader, optimizer, lr, weight_decay, momentum, epoch, scaler, args):
    for i, (views, _) in enumerate(loader):
        print(i)
        utils.seen["views"].append([(*view.shape, round(view.mean().item(), 4)) for view in views])
        value = loss(student.module.head(student.module.backbone(views[0].cuda())))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
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
    utils.MetricLogger().synchronize_between_processes()
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
seen = dict(views=[])

class MetricLogger:
    def synchronize_between_processes(self):
        assert False

def init_distributed_mode(args):
    assert False

def has_batchnorms(network):
    return True
"""


def test_a_stand_in_trains_as_a_run_says(small_shapes, run, tmp_path, monkeypatch, capsys):
    """Ours, with the reference's names: what main puts in place arrives in the order of train.py, and is taken back."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name, text in zip(checkout.FILES, (MAIN, UTILS, VITS)):
        (folder / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "test_reference", sys.modules[__name__])
    try:
        before = torch.utils.data.DistributedSampler, torch.nn.parallel.DistributedDataParallel, torch.Tensor.cuda
        reference.main(reference.parse_args([str(folder), "--like", str(run(pictures=300)), "--output_dir",
                                             str(tmp_path / "theirs")]))
        seen = sys.modules["utils"].seen
        assert "print" not in vars(sys.modules["main_dino"]) and str(folder) not in sys.path
    finally:
        for name in checkout.FILES:
            sys.modules.pop(name, None)
    assert before == (torch.utils.data.DistributedSampler, torch.nn.parallel.DistributedDataParallel, torch.Tensor.cuda)
    assert seen["head"] == (3, 32, 256, False, True) and seen["loss"] == (64, 4, 0.1, 0.9)
    images = data.open_data("shapes:32").train
    batches = list(iter_batch_keys(0, 36, 300, 0, 16))
    assert len(seen["views"]) == len(batches) == 36
    for views, batch in zip(seen["views"], batches):
        value = sum(images[index][0].getpixel((9, 9))[0] / 255 for _, index in batch) / 16
        assert views == [(16, 3, size, size, pytest.approx(value, abs=1e-4)) for size in (32, 32, 16, 16)]
    records = [json.loads(line) for line in (tmp_path / "theirs" / "log.jsonl").read_text().splitlines()]
    assert [record.get("knn", record.get("step")) for record in records] == [
        "untrained backbone", 4, 9, 14, 17, "epoch 0", 19, 24, 29, 34, 35, "epoch 1"]
    assert all(record["loss"] > 0 and record["lr"] == 0.0005 for record in records if "loss" in record)
    assert "k-NN of epoch 1: top-1" in capsys.readouterr().out
    weights = load_checkpoint(tmp_path / "theirs" / "checkpoint.pth")["teacher"]
    backbone, info = load_backbone(str(tmp_path / "theirs" / "teacher.safetensors"))
    assert all(torch.equal(x, weights[f"backbone.{name}"]) for name, x in backbone.state_dict().items())
    assert info["image_size"] == 32 and backbone.num_heads == 2


def test_the_checkout_trains_as_a_run_did(tmp_path, request, small_shapes):
    """With --reference alone: nothing of the reference is in this project."""
    folder_of_it = request.config.getoption("--reference")
    if folder_of_it is None:
        pytest.skip("needs --reference DIR, a checkout of facebookresearch/dino")
    folder = tmp_path / "run"
    train.main(train.parse_args([*SMALL, "--linear_probe", "--output_dir", str(folder)]))
    args = reference.parse_args([folder_of_it, "--like", str(folder), "--output_dir", str(tmp_path / "theirs")])
    reference.main(args)
    ours, theirs = ([json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
                    for path in (folder, tmp_path / "theirs"))
    ours = [record for record in ours if record.get("knn") != "raw pixels"]
    assert [record.get("knn", record.get("step")) for record in ours] == [
        record.get("knn", record.get("step")) for record in theirs]
    for mine, their in zip(ours, theirs):
        assert their.keys() <= mine.keys()
        if "loss" in their:
            for name in ("lr", "weight_decay"):
                assert their[name] == pytest.approx(mine[name], rel=1e-6), name
            assert their["loss"] == pytest.approx(mine["loss"], abs=0.2)  # other weights, other views
    weights = load_backbone(str(tmp_path / "run" / "teacher.safetensors"))[0].state_dict()
    found, info = load_backbone(str(tmp_path / "theirs" / "teacher.safetensors"))
    assert {name: x.shape for name, x in found.state_dict().items()} == {name: x.shape for name, x in weights.items()}
    assert found.num_heads == 2 and info["data_path"] == "shapes:32"
    state = load_checkpoint(tmp_path / "theirs" / "checkpoint.pth")["teacher"]
    assert all(torch.equal(x, state[f"backbone.{name}"]) for name, x in found.state_dict().items())
    with pytest.raises(reference.NoReference, match="holds a run already"):
        reference.main(args)
