import json
import pickle
import sys

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torchvision import models
from torchvision.ops import StochasticDepth

import evaluate
import export
import infer
import retrieve
import segment
import train
import visualize
from backbones import BackboneError, HeadlessClassifier, build_backbone, convert_sync_batchnorm
from common import weights as checkpoint
from common.checkpoint import load_checkpoint
from common.weights import CheckpointError, load_backbone
from data.datasets import open_data
from data.loaders import center_crop_view
from data.shapes import Shapes
from evaluation.supervised import Classifiers, FeatureExtractor, build_layer_decay_groups
from step import Settings, build_networks, compile_blocks, train_step

TRAIN = ("--global_crops_size 32 --local_crops_size 16 --local_crops_number 2 --out_dim 64 --hidden_dim 32 "
         "--batch_size_per_gpu 8 --warmup_epochs 0 --knn_every 2 --num_workers 0 --device cpu --precision fp32 "
         "--optimizer sgd").split()
ARCHS = ["resnet18", "timm:mobilenetv3_small_050"]


# ---- the networks ----

@pytest.mark.parametrize("arch, head", [("resnet50", "fc"), ("mobilenet_v3_small", "classifier.3"),
                                        ("shufflenet_v2_x0_5", "fc"), ("efficientnet_b0", "classifier.1"),
                                        ("regnet_y_400mf", "fc"), ("googlenet", "fc")])
def test_a_classifier_of_torchvision_loses_its_head_alone(arch, head):
    torch.manual_seed(0)
    flags = dict(aux_logits=False, init_weights=True) if arch == "googlenet" else {}
    theirs, ours, x = models.get_model(arch, **flags).eval(), HeadlessClassifier(arch, 64).eval(), torch.randn(2, 3, 64, 64)
    ours.model.load_state_dict({name: value for name, value in theirs.state_dict().items()
                                if not name.startswith(f"{head}.")})
    with torch.no_grad():
        feature = ours(x)
        torch.testing.assert_close(theirs.get_submodule(head)(feature), theirs(x), rtol=0, atol=1e-5)
    assert feature.shape == (2, ours.embed_dim) and isinstance(ours.train()(x), torch.Tensor)


@pytest.mark.parametrize("name, size", [("xcit_nano_12_p16_224", 48), ("vit_tiny_patch16_224", 32),
                                        ("mobilenetv3_small_050", 64)])
def test_a_model_of_timm_loses_its_head_alone(name, size):
    torch.manual_seed(0)
    sized = {"img_size": 64} if "vit" in name else {}
    theirs = timm.create_model(name, **sized, **({"dynamic_img_size": True} if "vit" in name else {})).eval()
    ours, x = HeadlessClassifier(f"timm:{name}", 64).eval(), torch.randn(2, 3, size, size)
    wanted = ours.model.state_dict()
    ours.model.load_state_dict({key: value for key, value in theirs.state_dict().items() if key in wanted})
    with torch.no_grad():
        feature = ours(x)
        pooled = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        torch.testing.assert_close(feature, pooled, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs.get_classifier()(feature), theirs(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["convnext_tiny", "mobilenet_v3_small", "timm:mobilenetv3_small_050"])
def test_nothing_is_drawn_in_a_teacher(arch):
    student, teacher = build_networks(dict(arch=arch, img_size=32), dict(out_dim=8, hidden_dim=8))
    views = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))] * 2
    with torch.no_grad():
        assert teacher.training and torch.equal(teacher(views), teacher(views))


def test_stochastic_depth_of_torchvision_is_scaled():
    theirs = [module.p for module in models.convnext_tiny().modules() if isinstance(module, StochasticDepth)]
    ours = [module.p for module in HeadlessClassifier("convnext_tiny", 32, 0.3).modules() if isinstance(module, StochasticDepth)]
    assert ours == pytest.approx([3 * p for p in theirs]) and max(ours) == pytest.approx(0.3)
    with pytest.raises(BackboneError, match="resnet18 has no stochastic depth"):
        HeadlessClassifier("resnet18", 32, 0.3)


@pytest.mark.parametrize("arch", ["resnet18", "timm:mobilenetv3_small_050"])
def test_synchronised_batch_norm_is_the_same_network(arch):
    _, teacher = build_networks(dict(arch=arch, img_size=32), dict(out_dim=8, hidden_dim=8, use_bn=True))
    x = torch.randn(2, 3, 32, 32)
    before = teacher.eval()([x])
    state = list(teacher.state_dict())
    made = convert_sync_batchnorm(teacher)
    kinds = [type(module).__name__ for module in made.modules() if hasattr(module, "running_mean")]
    assert torch.equal(made([x]), before) and list(made.state_dict()) == state
    assert kinds and all("Sync" in kind for kind in kinds)


def test_all_of_a_headless_is_compiled():
    networks = build_networks(dict(arch="resnet18", img_size=32), dict(out_dim=8, hidden_dim=8))
    compile_blocks(*networks)
    assert all(network.backbone._compiled_call_impl is not None for network in networks)


STATISTICS = """
import torch, torch.distributed as dist
from backbones import Headless, share_statistics
torch.manual_seed(0)
backbone = Headless("resnet18", 32)
dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
backbone.train()(torch.randn(2, 3, 32, 32))
mine = torch.cat([b.double().flatten() for b in backbone.buffers()])
theirs = [torch.empty_like(mine) for _ in range(2)]
dist.all_gather(theirs, mine)
assert not torch.equal(*theirs)
share_statistics(backbone)
assert torch.equal(torch.cat([b.double().flatten() for b in backbone.buffers()]), theirs[0])
dist.destroy_process_group()
"""


def test_processes_judge_by_the_same_statistics(run_torchrun):
    run_torchrun(2, STATISTICS)


def test_a_file_that_does_not_fit_allocates_nothing(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(checkpoint, "build_backbone", lambda sizes: made.append(build_backbone(sizes)) or made[-1])
    path = tmp_path / "junk.safetensors"
    save_file({"backbone.model.conv1.weight": torch.ones(13)}, path, {"backbone": json.dumps(
        dict(arch="timm:vit_giant_patch14_224", img_size=224))})
    with pytest.raises(CheckpointError, match="tensors do not fit"):
        load_backbone(path)
    assert len(made) == 1 and next(made[0].parameters()).is_meta
    for arch in ("timm:hf-hub:someone/model", "../model", 7):
        save_file({"x": torch.ones(13)}, path, {"backbone": json.dumps(dict(arch=arch, img_size=224))})
        with pytest.raises(CheckpointError, match="not the weights of a backbone"):
            load_backbone(path)
    save_file({"x": torch.ones(13)}, path, {"backbone": "resnet50"})  # somebody else's metadata
    with pytest.raises(CheckpointError, match="none of its 1 tensors"):
        load_backbone(path)


def test_stochastic_depth_is_timms():
    backbone = HeadlessClassifier("timm:xcit_nano_12_p16_224", 32, drop_path_rate=0.3)
    found = {module.drop_prob for module in backbone.modules() if type(module).__name__ == "DropPath"}
    assert max(found) == pytest.approx(0.3)
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(backbone.train()(x), backbone(x)) and torch.equal(backbone.eval()(x), backbone(x))


@pytest.mark.parametrize("arch, size, words", [
    ("resnet51", 64, "resnet51 is none of vit_tiny, vit_small, vit_base, vit_large and no classifier of torchvision"),
    ("resnet51", 64, "which has resnet"), ("timm:xcit_nano", 64, "no classifier of timm .*has timm:xcit_"),
    ("squeezenet1_1", 64, "no linear classifier"), ("alexnet", 32, "alexnet cannot look at 32 x 32 pixels: "),
    ("timm:vit_tiny_patch16_224", 40, "cannot look at 40 x 40"), ("resnet18", 5000, "5000 pixels are not sides from")])
def test_what_cannot_be_a_backbone(arch, size, words):
    with pytest.raises(BackboneError, match=words):
        HeadlessClassifier(arch, size)


def test_without_timm_there_is_one_line(monkeypatch, exit_message):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "this needs timm, which is not installed: pip install timm" in exit_message(
        train.parse_args, ["--arch", "timm:xcit_nano_12_p16_224"])


def test_batch_norm_of_the_teacher_sees_the_teachers_pictures():
    """Its weights follow the student's; its statistics are its own, of the two global views, as in the reference."""
    student, teacher = build_networks(dict(arch="resnet18", img_size=32), dict(out_dim=16, hidden_dim=16))
    expected = models.resnet18()
    expected.load_state_dict(teacher.backbone.model.state_dict(), strict=False)
    torch.manual_seed(0)
    views = [torch.randn(4, 3, side, side) for side in (32, 32, 16)]
    expected.train()(torch.cat(views[:2]))
    optimizer = train.build_optimizer("sgd", train.param_groups(student))
    now = Settings(0, lr=0.1, weight_decay=0.0, momentum=0.9, teacher_temp=0.04, frozen=False)
    train_step(student, teacher, train.DINOLoss(16), optimizer, torch.amp.GradScaler("cpu", enabled=False),
               torch.tensor(0), [views], now)
    theirs = dict(expected.named_buffers())
    for name, value in teacher.backbone.model.named_buffers():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6)
    assert (student.backbone.model.bn1.running_mean != teacher.backbone.model.bn1.running_mean).any()
    assert student.backbone.model.bn1.num_batches_tracked == 2  # two sizes of views, two passes


def test_fine_tuning_rates_of_a_backbone_without_blocks():
    network = Classifiers(FeatureExtractor(HeadlessClassifier("resnet18", 32)), 5, frozen=False)
    groups = build_layer_decay_groups(network, lr=0.1, weight_decay=0.05, layer_decay=0.5)
    peaks = {name: group["peak"] for group in groups for name, _ in group["params"]}
    assert peaks.pop("heads.0.weight") == peaks.pop("heads.0.bias") == 0.1 and set(peaks.values()) == {0.05}
    assert len(peaks) == len(list(network.tokens.parameters()))


# ---- through every command ----

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """16 labelled pictures to train on, and 8 to judge by."""
    folder = tmp_path_factory.mktemp("pictures")
    for part, count in (("train", 16), ("val", 8)):
        shapes = Shapes("train" if part == "train" else "test", count, 48)
        for i in range(count):
            picture, label = shapes[i]
            path = folder / part / str(label % 2) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    return folder


@pytest.fixture(scope="module", params=ARCHS)
def runs(request, pictures, tmp_path_factory):
    """A run of two epochs, and one that was killed between them: (arch, its folder, the other's)."""
    class Killed(Exception):
        pass

    def save_then_die(*args, **kwargs):
        save(*args, **kwargs)
        raise Killed

    folder, save = tmp_path_factory.mktemp("runs"), train.save_run
    flags = [*TRAIN, "--arch", request.param, "--data_path", str(pictures), "--epochs", "2", "--output_dir"]
    train.main(train.parse_args([*flags, str(folder / "whole")]))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save_run", save_then_die)
        train.main(train.parse_args([*flags, str(folder / "parts")]))
    train.main(train.parse_args([*flags, str(folder / "parts")]))
    return request.param, folder / "whole", folder / "parts"


def test_an_interrupted_run_ends_like_a_whole_one(runs):
    _, *folders = runs
    whole, parts = (load_checkpoint(folder / "checkpoint.pth") for folder in folders)
    assert whole["progress"]["step"] == parts["progress"]["step"] == 4
    for which in ("student", "teacher", "dino_loss"):
        for name, value in whole[which].items():
            assert torch.equal(value, parts[which][name]), f"{which} {name}"


def test_a_file_says_what_it_is(runs):
    arch, folder, _ = runs
    backbone, info = load_backbone(folder / "teacher.safetensors")
    assert info["backbone"] == dict(arch=arch, img_size=32) and not backbone.training
    state = load_checkpoint(folder / "checkpoint.pth")["teacher"]
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state[f"backbone.{name}"])
    again, info = load_backbone(folder / "checkpoint.pth", key="student")
    assert type(again) is HeadlessClassifier and info["network"] == "student"


def test_neighbours_are_those_of_its_features(runs, pictures, capsys):
    _, folder, _ = runs
    ckpt = str(folder / "teacher.safetensors")
    flags = ["--ckpt", ckpt, "--data_path", str(pictures), "--num_workers", "0", "--device", "cpu"]
    evaluate.main(evaluate.parse_args(["knn", *flags, "--nb_knn", "20", "--features", str(folder / "f.safetensors")]))
    backbone, _ = load_backbone(ckpt)
    data = open_data(str(pictures))
    with torch.no_grad():
        expected = backbone(torch.stack([center_crop_view(data.train_labeled[i][0], 32) for i in range(16)]))
    torch.testing.assert_close(load_file(folder / "f.safetensors")["bank"], expected, rtol=0, atol=1e-5)
    found = json.loads((folder / "teacher.knn.json").read_text())["knn"]["16"]
    said = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][-1]
    assert said["knn"] == "epoch 1" and [found["top1"], found["top5"]] == [said["top1"], said["top5"]]


def test_judging_leaves_batch_norm_as_it_is(runs):
    teacher = load_checkpoint(runs[1] / "checkpoint.pth")["teacher"]
    counts = {value.item() for name, value in teacher.items() if name.endswith("num_batches_tracked")}
    assert counts == {4}  # steps; each shows the teacher its two views at once


def test_its_features_are_classified(runs, pictures, capsys):
    arch, folder, _ = runs
    flags = ["--ckpt", str(folder / "teacher.safetensors"), "--data_path", str(pictures), "--num_workers", "0",
             "--device", "cpu", "--epochs", "1", "--batch_size_per_gpu", "8"]
    evaluate.main(evaluate.parse_args(["linear", *flags, "--lr", "0.01"]))
    evaluate.main(evaluate.parse_args(["finetune", *flags, "--warmup_epochs", "0", "--lr", "0.1"]))
    evaluate.main(evaluate.parse_args(["finetune", *flags, "--warmup_epochs", "0", "--test_only"]))
    tuned, _ = load_backbone(folder / "teacher.finetune" / "classifier.safetensors")
    before, _ = load_backbone(folder / "teacher.safetensors")
    assert any(not torch.equal(a, b) for a, b in zip(tuned.parameters(), before.parameters()))
    assert json.loads((folder / "teacher.finetune" / "result.json").read_text())["judged"] == 8


def test_an_exported_file_gives_its_features(runs, tmp_path, exit_message, capsys):
    arch, folder, _ = runs
    flags = "--normalize nhwc --dynamic none --batch_size 3" if arch == "resnet18" else ""
    output = str(tmp_path / "model.onnx")
    export.main(export.parse_args(["--ckpt", str(folder / "teacher.safetensors"), "--output", output, *flags.split()]))
    assert "at most" in capsys.readouterr().out
    backbone, _ = load_backbone(folder / "teacher.safetensors")
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    pixels = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(1)).byte()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (train.IMAGENET_MEAN, train.IMAGENET_STD))
    images = (pixels / 255 - mean) / std
    feed = pixels.permute(0, 2, 3, 1).contiguous() if flags else images
    found, = session.run(None, {"image": feed.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), backbone(images), rtol=0, atol=1e-4)
    line = exit_message(lambda *a: visualize.main(visualize.parse_args(a)), "attention", "shapes", "--ckpt", output)
    assert "gives features alone, this needs attention" in line
    session, about = infer.open_model(output)
    feature, attention = infer.infer(session, about, infer.prepare(Shapes("test", 1, 48)[0][0], about))
    assert feature.shape == (backbone.embed_dim,) and attention is None and feature.dtype == np.float32


def test_weights_go_back_to_their_library(runs, tmp_path, exit_message):
    arch, folder, _ = runs
    ckpt, output = str(folder / "teacher.safetensors"), str(tmp_path / "weights")
    backbone, _ = load_backbone(ckpt)
    export.main(export.parse_args(["--ckpt", ckpt, "--format", "dino", "--output", output]))
    name, x = arch.removeprefix("timm:"), torch.randn(2, 3, 32, 32)
    theirs = timm.create_model(name, num_classes=0) if arch.startswith("timm:") else models.get_model(name)
    missing, unexpected = theirs.load_state_dict(torch.load(output), strict=False)
    assert not unexpected and all(key.startswith("fc.") for key in missing)
    theirs.fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(x), backbone(x), rtol=0, atol=1e-5)
    assert "has no such names" in exit_message(export_main, "--ckpt", ckpt, "--format", "transformers")


def export_main(*argv):
    export.main(export.parse_args(argv))


def test_a_released_resnet_is_recognised(tmp_path):
    """Files with the names of torchvision and no word on what they are, alone and as a full checkpoint."""
    torch.manual_seed(0)
    theirs = models.get_model("resnet18")
    theirs.fc = torch.nn.Identity()
    weights = theirs.eval().state_dict()
    torch.save(weights, tmp_path / "alone.pth")
    torch.save({"teacher": {f"backbone.{name}": value for name, value in weights.items()} | {
        "head.mlp.0.weight": torch.ones(2, 2)}, "epoch": 3}, tmp_path / "full.pth")
    old = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    torch.save({f"module.{name}": value for name, value in old.items()} | {
        "module.projection_head.0.weight": torch.ones(3, 3), "module.fc.bias": torch.ones(1000)}, tmp_path / "old.pth")
    x = torch.randn(2, 3, 64, 64)
    for name in ("alone.pth", "full.pth", "old.pth"):
        backbone, info = load_backbone(tmp_path / name)
        assert info["backbone"] == dict(arch="resnet18")
        with torch.no_grad():
            assert torch.equal(backbone(x), theirs(x))
    del weights["layer4.1.bn2.bias"]
    torch.save(weights, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match="not the tensors of a ResNet of torchvision"):
        load_backbone(tmp_path / "less.pth")


def test_one_picture_is_too_few_for_batch_norm(pictures, tmp_path, exit_message):
    line = exit_message(lambda *argv: train.main(train.parse_args(argv)), *TRAIN, "--arch", "resnet18", "--epochs", "1",
                   "--batch_size_per_gpu", "1", "--local_crops_number", "1", "--data_path", str(pictures),
                   "--output_dir", str(tmp_path / "run"))
    assert "batch norm needs several pictures to learn from: raise --batch_size_per_gpu" in line


REFUSALS = {  # command -> what its one line says
    "segment masks": "this needs attention", "segment video --data_path {d}": "this needs patch tokens",
    "visualize attention shapes": "this needs attention",
    "visualize features shapes": "this needs patch tokens",
    "retrieve landmarks --data_path {d}": "this needs views of any size",
    "retrieve copies --data_path {d}": "this needs patch tokens",
    "evaluate linear --data_path {p} --avgpool_patchtokens": "leave --avgpool_patchtokens out",
    "evaluate knn --data_path {p} --image_size 5000": "5000 pixels are not sides from 1 to 4096",
    "export --precision mixed": "--precision is for vision transformers",
    "export --heads mean": "--heads is for",
    "export --dynamic size": "--dynamic size is for",
    "export --opset 17": "--opset 17 is for",
    "export --image_size 5000 32": "5000 x 32 pixels are not sides",
    "evaluate finetune --data_path {p} --drop_path_rate 0.2": "--drop_path_rate is of vision transformers",
    "export --patch_tokens": "--patch_tokens is for"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The file of a ResNet-18."""
    path = tmp_path_factory.mktemp("small") / "teacher.safetensors"
    weights = {f"backbone.{name}": value for name, value in HeadlessClassifier("resnet18", 32).state_dict().items()}
    checkpoint.save_model(path, weights, dict(backbone=dict(arch="resnet18", img_size=32)))
    return str(path)


@pytest.mark.parametrize("command", REFUSALS)
def test_what_needs_a_transformer_says_so(small, pictures, tmp_path, exit_message, command):
    davis = tmp_path / "davis"
    for part, mode in (("JPEGImages", "jpg"), ("Annotations", "png")):
        path = davis / part / "480p" / "cat" / f"0.{mode}"
        path.parent.mkdir(parents=True)
        Shapes("test", 1, 48)[0][0].convert("P" if mode == "png" else "RGB").save(path)
    for part, file in (("original", "200000.png"), ("strong", "200000.png"), ("jpg", "a.jpg")):
        (davis / part).mkdir()
        Shapes("test", 1, 48)[0][0].save(davis / part / file)
    truth = dict(imlist=["a"], qimlist=["a"], gnd=[dict(bbx=[0, 0, 9, 9], easy=[0], hard=[], junk=[])])
    (davis / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth))
    name, *argv = command.format(d=davis, p=pictures).split()
    script = {"segment": segment, "visualize": visualize, "retrieve": retrieve, "evaluate": evaluate,
              "export": export}[name]
    line = exit_message(lambda *a: script.main(script.parse_args(a)), *argv, "--ckpt", small)
    assert REFUSALS[command] in line


def test_a_map_of_pictures_is_drawn(small, pictures, tmp_path, capsys):
    visualize.main(visualize.parse_args(["embedding", "--ckpt", small, "--data_path", str(pictures), "--output_dir",
                                         str(tmp_path), "--num_workers", "0", "--device", "cpu"]))
    assert (tmp_path / "teacher.embedding.png").exists()
