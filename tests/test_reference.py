import json
from argparse import Namespace

import pytest
import torch
from torchvision import transforms

import checkout
import data
import reference
import train
from batches import batch_keys
from checkpoint import CheckpointError, load_backbone
from resume import load_state, save_state

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
        save_state(folder / "checkpoint.pth", flags=vars(args),
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
    state = load_state(tmp_path / "run" / "checkpoint.pth")
    for name, value, words in (("arch", "resnet18", "not with resnet18"), ("device", "mps", "cannot run on mps here")):
        save_state(tmp_path / "run" / "checkpoint.pth", **state | {"flags": state["flags"] | {name: value}})
        with pytest.raises(reference.NoReference, match=words):
            reference.flags_of(tmp_path / "run")


def test_pictures_come_in_the_order_of_train():
    flags = Namespace(batch_size_per_gpu=3, seed=5)
    order = reference.Order(range(11), flags)
    for epoch in (0, 1):
        order.set_epoch(epoch)
        expected = [index for batch in batch_keys(3 * epoch, 3 * epoch + 3, 11, 5, 3) for _, index in batch]
        assert list(order) == expected and len(order) == len(expected) == 9
        assert {e for batch in batch_keys(3 * epoch, 3 * epoch + 3, 11, 5, 3) for e, _ in batch} == {epoch}


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
    with checkout.stay("cpu"):
        assert x.cuda(non_blocking=True) is x and layer.cuda() is layer and torch.cuda.synchronize() is None
    assert (torch.Tensor.cuda, torch.nn.Module.cuda, torch.cuda.synchronize) == before


def test_the_checkout_trains_as_a_run_did(tmp_path, request, monkeypatch):
    """With --reference alone: nothing of the reference is in this project."""
    folder_of_it = request.config.getoption("--reference")
    if folder_of_it is None:
        pytest.skip("needs --reference DIR, a checkout of facebookresearch/dino")
    full = data.Shapes.__init__
    monkeypatch.setattr(data.Shapes, "__init__",
                        lambda self, part, length, size: full(self, part, 300 if part == "train" else 60, size))
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
    state = load_state(tmp_path / "theirs" / "checkpoint.pth")["teacher"]
    assert all(torch.equal(x, state[f"backbone.{name}"]) for name, x in found.state_dict().items())
    with pytest.raises(reference.NoReference, match="holds a run already"):
        reference.main(args)
