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
from augment import IMAGENET_MEAN, IMAGENET_STD
from backbones import BackboneError, HeadlessClassifier, build_backbone, convert_sync_batchnorm
from common import weights
from common.checkpoint import CheckpointError, load_checkpoint
from common.weights import load_backbone
from data.datasets import open_data
from data.loaders import center_crop_view
from data.shapes import Shapes
from dino_loss import DINOLoss
from evaluation.classifiers import Classifiers, FeatureExtractor
from evaluation.supervised import build_layer_decay_groups
from optim import build_optimizer, build_param_groups
from train import Schedule, build_networks, compile_blocks, train_step

TRAIN = ("--global_crops_size 32 --local_crops_size 16 --local_crops_number 2 --out_dim 64 --hidden_dim 32 "
         "--batch_size_per_gpu 8 --warmup_epochs 0 --knn_every 2 --num_workers 0 --device cpu --precision fp32 "
         "--optimizer sgd --lr 0.002 --freeze_last_layer 1 --blur 1 0.1 0.5").split()
ARCHS = ["shufflenet_v2_x0_5", "timm:test_efficientnet"]  # small; timm fuses batch norm with the activation


# ---- the networks ----

@pytest.mark.parametrize("arch, head", [("resnet18", "fc"), ("mobilenet_v3_small", "classifier.3"),
                                        ("shufflenet_v2_x0_5", "fc"), ("efficientnet_b0", "classifier.1"),
                                        ("regnet_y_400mf", "fc"), ("googlenet", "fc")])
def test_torchvision_classifier_loses_only_its_head(arch, head):
    torch.manual_seed(0)
    flags = dict(aux_logits=False, init_weights=True) if arch == "googlenet" else {}
    theirs, ours = models.get_model(arch, **flags).eval(), HeadlessClassifier(arch, 64).eval()
    x = torch.randn(2, 3, 64, 64)
    ours.model.load_state_dict({name: value for name, value in theirs.state_dict().items()
                                if not name.startswith(f"{head}.")})
    with torch.no_grad():
        feature = ours(x)
        torch.testing.assert_close(theirs.get_submodule(head)(feature), theirs(x), rtol=0, atol=1e-5)
    assert feature.shape == (2, ours.embed_dim) and isinstance(ours.train()(x), torch.Tensor)


@pytest.mark.parametrize("name, size", [("xcit_nano_12_p16_224", 48), ("vit_tiny_patch16_224", 32),
                                        ("mobilenetv3_small_050", 64)])
def test_timm_model_loses_only_its_head(name, size):
    torch.manual_seed(0)
    flags = dict(img_size=64, dynamic_img_size=True) if "vit" in name else {}
    theirs = timm.create_model(name, **flags).eval()
    ours, x = HeadlessClassifier(f"timm:{name}", 64).eval(), torch.randn(2, 3, size, size)
    wanted = ours.model.state_dict()
    ours.model.load_state_dict({key: value for key, value in theirs.state_dict().items() if key in wanted})
    with torch.no_grad():
        feature = ours(x)
        pooled = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        torch.testing.assert_close(feature, pooled, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs.get_classifier()(feature), theirs(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["convnext_tiny", "mobilenet_v3_small", "timm:mobilenetv3_small_050"])
def test_teacher_is_deterministic_in_train_mode(arch):
    _, teacher = build_networks(dict(arch=arch, img_size=32), dict(out_dim=8, hidden_dim=8))
    crops = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))] * 2
    with torch.no_grad():
        assert teacher.training and torch.equal(teacher(crops), teacher(crops))


def test_torchvision_stochastic_depth_is_scaled():
    theirs, ours = ([module.p for module in model.modules() if isinstance(module, StochasticDepth)]
                    for model in (models.convnext_tiny(), HeadlessClassifier("convnext_tiny", 32, 0.3)))
    assert ours == pytest.approx([3 * p for p in theirs]) and max(ours) == pytest.approx(0.3)
    with pytest.raises(BackboneError, match="resnet18 has no stochastic depth"):
        HeadlessClassifier("resnet18", 32, 0.3)


STEM = dict(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, conv_stem=True)


@pytest.mark.parametrize("arguments", [*(dict(arch=arch, img_size=32) for arch in ARCHS), STEM],
                         ids=[*ARCHS, "convolutional stem"])
def test_sync_batchnorm_keeps_names_and_outputs(arguments):
    _, teacher = build_networks(arguments, dict(out_dim=8, hidden_dim=8, use_bn=True))
    x = torch.randn(2, 3, 32, 32)
    before = teacher.eval()([x])
    state = list(teacher.state_dict())
    converted = convert_sync_batchnorm(teacher)
    kinds = [type(module).__name__ for module in converted.modules() if hasattr(module, "running_mean")]
    assert torch.equal(converted([x]), before) and list(converted.state_dict()) == state
    assert len(kinds) > 2 and all("Sync" in kind for kind in kinds)  # two are of the head


def test_headless_classifier_is_compiled_as_a_whole():
    networks = build_networks(dict(arch="resnet18", img_size=32), dict(out_dim=8, hidden_dim=8))
    for network in networks:
        compile_blocks(network.backbone)
    assert all(network.backbone._compiled_call_impl is not None for network in networks)


BROADCAST = """
import torch, torch.distributed as dist
from backbones import build_backbone, broadcast_buffers
torch.manual_seed(0)
backbone = build_backbone({arguments})
dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
backbone.train()(torch.randn(2, 3, 32, 32))
own = torch.cat([b.double().flatten() for b in backbone.buffers()])
gathered = [torch.empty_like(own) for _ in range(2)]
dist.all_gather(gathered, own)
assert not torch.equal(*gathered)
broadcast_buffers(backbone)
assert torch.equal(torch.cat([b.double().flatten() for b in backbone.buffers()]), gathered[0])
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [dict(arch="resnet18", img_size=32), STEM])
def test_broadcast_buffers_gives_all_ranks_the_statistics_of_rank_0(run_torchrun, arguments):
    run_torchrun(2, BROADCAST.format(arguments=arguments))


def test_mismatched_file_allocates_nothing(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(weights, "build_backbone", lambda sizes: built.append(build_backbone(sizes)) or built[-1])
    path = tmp_path / "junk.safetensors"
    save_file({"backbone.model.conv1.weight": torch.ones(13)}, path, {"backbone": json.dumps(
        dict(arch="timm:vit_giant_patch14_224", img_size=224))})
    with pytest.raises(CheckpointError, match="is missing, expected"):
        load_backbone(path)
    assert len(built) == 1 and next(built[0].parameters()).is_meta
    for arch in ("timm:hf-hub:someone/model", "../model", 7):
        save_file({"x": torch.ones(13)}, path, {"backbone": json.dumps(dict(arch=arch, img_size=224))})
        with pytest.raises(CheckpointError, match="not the weights of a backbone"):
            load_backbone(path)
    save_file({"x": torch.ones(13)}, path, {"backbone": "resnet50"})  # metadata of another program
    with pytest.raises(CheckpointError, match="none of its 1 tensors"):
        load_backbone(path)


def test_timm_stochastic_depth_is_set():
    backbone = HeadlessClassifier("timm:xcit_nano_12_p16_224", 32, drop_path_rate=0.3)
    rates = {module.drop_prob for module in backbone.modules() if type(module).__name__ == "DropPath"}
    assert max(rates) == pytest.approx(0.3)
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(backbone.train()(x), backbone(x)) and torch.equal(backbone.eval()(x), backbone(x))


@pytest.mark.parametrize("arch, size, message", [
    ("resnet51", 64, "resnet51 is none of vit_tiny, vit_small, vit_base, vit_large and no classifier of torchvision"),
    ("resnet51", 64, "did you mean resnet"), ("timm:xcit_nano", 64, "no classifier of timm .*mean timm:xcit_"),
    ("squeezenet1_1", 64, "does not end in a linear classifier"),
    ("alexnet", 32, "alexnet does not support images of 32 x 32 pixels: "),
    ("timm:test_vit", 40, "not support images of 40 x 40 pixels"),
    ("resnet18", 5000, "5000 is not from 1 to 4096 pixels")])
def test_unsupported_backbones_raise_backbone_error(arch, size, message):
    with pytest.raises(BackboneError, match=message):
        HeadlessClassifier(arch, size)


def test_missing_timm_names_the_pip_command(monkeypatch, exit_message):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm is not installed: pip install timm" in exit_message(
        train.parse_args, ["--arch", "timm:xcit_nano_12_p16_224"])


def test_teacher_batch_norm_has_statistics_of_the_global_crops():
    """The EMA updates its parameters; its buffers come from its own forward passes, as in the reference."""
    student, teacher = build_networks(dict(arch="resnet18", img_size=32), dict(out_dim=16, hidden_dim=16))
    expected = models.resnet18()
    expected.load_state_dict(teacher.backbone.model.state_dict(), strict=False)
    torch.manual_seed(0)
    crops = [torch.randn(4, 3, side, side) for side in (32, 32, 16)]
    expected.train()(torch.cat(crops[:2]))
    optimizer = build_optimizer("sgd", build_param_groups(student))
    schedule = Schedule(lr=0.1, weight_decay=0.0, momentum=0.9, teacher_temp=0.04, freeze_last_layer=False)
    train_step(student, teacher, DINOLoss(16), optimizer, torch.amp.GradScaler("cpu", enabled=False), [crops], schedule,
               train.parse_args(TRAIN), torch.tensor(True))
    buffers = dict(expected.named_buffers())
    for name, value in teacher.backbone.model.named_buffers():
        torch.testing.assert_close(value, buffers[name], rtol=0, atol=1e-6)
    assert (student.backbone.model.bn1.running_mean != teacher.backbone.model.bn1.running_mean).any()
    assert student.backbone.model.bn1.num_batches_tracked == 2  # one forward pass per crop size


def test_layer_decay_of_a_backbone_without_blocks():
    network = Classifiers(FeatureExtractor(HeadlessClassifier("resnet18", 32)), 5, frozen=False)
    groups = build_layer_decay_groups(network, lr=0.1, weight_decay=0.05, layer_decay=0.5)
    peaks = {name: group["peak"] for group in groups for name, _ in group["params"]}
    assert peaks.pop("heads.0.weight") == peaks.pop("heads.0.bias") == 0.1 and set(peaks.values()) == {0.05}
    assert len(peaks) == len(list(network.tokens.parameters()))


# ---- all commands ----

@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    """A folder of 16 training and 8 validation images of two classes."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    for part, count in (("train", 16), ("val", 8)):
        shapes = Shapes("train" if part == "train" else "test", count, 48)
        for i in range(count):
            image, label = shapes[i]
            path = folder / part / str(label % 2) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return str(folder)


@pytest.fixture(scope="module", params=ARCHS)
def runs(request, data_path, tmp_path_factory):
    """Arch, output folder of a run of two epochs, and that of one which was interrupted between them and resumed."""
    class Interrupt(Exception):
        pass

    def save_then_interrupt(*args, **kwargs):
        save(*args, **kwargs)
        raise Interrupt

    folder, save = tmp_path_factory.mktemp("runs"), train.save_run
    flags = [*TRAIN, "--arch", request.param, "--data_path", data_path, "--epochs", "2", "--output_dir"]
    train.main(train.parse_args([*flags, str(folder / "uninterrupted")]))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(train, "save_run", save_then_interrupt)
        train.main(train.parse_args([*flags, str(folder / "resumed")]))
    train.main(train.parse_args([*flags, str(folder / "resumed")]))
    return request.param, folder / "uninterrupted", folder / "resumed"


def test_resumed_run_equals_uninterrupted_run(runs):
    _, *folders = runs
    expected, resumed = (load_checkpoint(folder / "checkpoint.pth") for folder in folders)
    assert expected["progress"]["step"] == resumed["progress"]["step"] == 4
    for which in ("student", "teacher", "dino_loss"):
        for name, value in expected[which].items():
            assert torch.equal(value, resumed[which][name]), f"{which} {name}"


def test_model_file_describes_its_backbone(runs):
    arch, folder, _ = runs
    backbone, info = load_backbone(folder / "teacher.safetensors")
    assert info["backbone"] == dict(arch=arch, img_size=32) and not backbone.training
    state = load_checkpoint(folder / "checkpoint.pth")["teacher"]
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state[f"backbone.{name}"])
    student, info = load_backbone(folder / "checkpoint.pth", key="student")
    assert type(student) is HeadlessClassifier and info["network"] == "student"


def test_knn_uses_its_features_and_equals_online_knn(runs, data_path):
    _, folder, _ = runs
    ckpt = str(folder / "teacher.safetensors")
    flags = ["--ckpt", ckpt, "--data_path", data_path, "--num_workers", "0", "--device", "cpu"]
    evaluate.main(evaluate.parse_args(["knn", *flags, "--nb_knn", "20", "--features", str(folder / "f.safetensors")]))
    backbone, _ = load_backbone(ckpt)
    data = open_data(data_path)
    with torch.no_grad():
        expected = backbone(torch.stack([center_crop_view(data.train_labeled[i][0], 32) for i in range(16)]))
    features, = (x for x in load_file(folder / "f.safetensors").values() if x.shape == expected.shape)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    knn = json.loads((folder / "teacher.knn.photos.json").read_text())["knn"]["16"]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][-1]
    assert log["eval"] == "epoch 1" and [knn["top1"], knn["top5"]] == [log["knn_top1"], log["knn_top5"]]


def test_evaluation_does_not_change_batch_norm(runs):
    teacher = load_checkpoint(runs[1] / "checkpoint.pth")["teacher"]
    counts = {value.item() for name, value in teacher.items() if name.endswith("num_batches_tracked")}
    assert counts == {4}  # steps; the teacher sees both global crops in one forward pass


def test_linear_and_finetune(runs, data_path):
    _, folder, _ = runs
    flags = ["--ckpt", str(folder / "teacher.safetensors"), "--data_path", data_path, "--num_workers", "0",
             "--device", "cpu", "--epochs", "1", "--batch_size_per_gpu", "8"]
    evaluate.main(evaluate.parse_args(["linear", *flags, "--lr", "0.01"]))
    evaluate.main(evaluate.parse_args(["finetune", *flags, "--warmup_epochs", "0", "--lr", "0.1"]))
    evaluate.main(evaluate.parse_args(["finetune", *flags, "--warmup_epochs", "0", "--test_only"]))
    tuned, _ = load_backbone(folder / "teacher.finetune.photos" / "classifier.safetensors")
    before, _ = load_backbone(folder / "teacher.safetensors")
    assert any(not torch.equal(a, b) for a, b in zip(tuned.parameters(), before.parameters()))
    assert json.loads((folder / "teacher.finetune.photos" / "result.json").read_text())["num_images"] == 8
    ckpt, output = folder / "teacher.finetune.photos" / "classifier.safetensors", str(folder / "classifier.onnx")
    classifier = load_file(ckpt)
    if runs[0] != ARCHS[0]:
        return
    export.main(export.parse_args(["--ckpt", str(ckpt), "--output", output, "--normalize", "nchw"]))
    session, about = infer.open_model(output)
    image = infer.prepare(Shapes("test", 1, 48)[0][0], about)
    outputs = infer.run_model(session, about, image)
    with torch.no_grad():
        features = tuned(center_crop_view(image, 32)[None])[0]
    torch.testing.assert_close(torch.from_numpy(outputs["features"]), features, rtol=0, atol=1e-4)
    logits = classifier["classifier.weight"] @ features + classifier["classifier.bias"]
    torch.testing.assert_close(torch.from_numpy(outputs["logits"]), logits, rtol=0, atol=1e-4)
    assert about["classes"] == ["0", "1"]


def test_exported_file_computes_its_features(runs, tmp_path, exit_message):
    arch, folder, _ = runs
    flags = "--normalize nhwc --dynamic none --batch_size 3" if arch == ARCHS[0] else ""
    output = str(tmp_path / "model.onnx")
    export.main(export.parse_args(["--ckpt", str(folder / "teacher.safetensors"), "--output", output, *flags.split()]))
    backbone, _ = load_backbone(folder / "teacher.safetensors")
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    pixels = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(1)).byte()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    images = (pixels / 255 - mean) / std
    feed = pixels.permute(0, 2, 3, 1).contiguous() if flags else images
    feature, = session.run(None, {"image": feed.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(feature), backbone(images), rtol=0, atol=1e-4)
    line = exit_message(lambda *a: visualize.main(visualize.parse_args(a)), "attention", "shapes", "--ckpt", output)
    assert "attention" in line
    session, about = infer.open_model(output)
    feature, attention = infer.infer(session, about, infer.prepare(Shapes("test", 1, 48)[0][0], about))
    assert feature.shape == (backbone.embed_dim,) and attention is None and feature.dtype == np.float32


def test_weights_load_in_the_original_library(runs, tmp_path, exit_message):
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
    assert "transformers" in exit_message(export_main, "--ckpt", ckpt, "--format", "transformers")


def export_main(*argv):
    export.main(export.parse_args(argv))


def test_released_resnet_is_identified_by_its_weights(tmp_path):
    """Files with torchvision's names and no description: backbone only, full checkpoint, other prefixes."""
    torch.manual_seed(0)
    theirs = models.get_model("resnet18")
    theirs.fc = torch.nn.Identity()
    state = theirs.eval().state_dict()
    torch.save(state, tmp_path / "backbone.pth")
    torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items()} | {
        "head.mlp.0.weight": torch.ones(2, 2)}, "epoch": 3}, tmp_path / "full.pth")
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save({f"module.{name}": value for name, value in old.items()} | {
        "module.projection_head.0.weight": torch.ones(3, 3), "module.fc.bias": torch.ones(1000)}, tmp_path / "old.pth")
    x = torch.randn(2, 3, 64, 64)
    for name in ("backbone.pth", "full.pth", "old.pth"):
        backbone, info = load_backbone(tmp_path / name)
        assert info["backbone"] == dict(arch="resnet18")
        with torch.no_grad():
            assert torch.equal(backbone(x), theirs(x))
    del state["layer4.1.bn2.bias"]
    torch.save(state, tmp_path / "incomplete.pth")
    with pytest.raises(CheckpointError, match="not the tensors of a ResNet of torchvision"):
        load_backbone(tmp_path / "incomplete.pth")


def test_batch_size_1_is_too_small_for_batch_norm(data_path, tmp_path, exit_message):
    line = exit_message(lambda *argv: train.main(train.parse_args(argv)), *TRAIN, "--arch", "resnet18", "--epochs", "1",
                        "--batch_size_per_gpu", "1", "--local_crops_number", "1", "--data_path", data_path,
                        "--output_dir", str(tmp_path / "run"))
    assert "batch norm" in line and "raise --batch_size_per_gpu" in line


UNSUPPORTED = {  # command -> what its error names
    "segment masks": "attention", "segment video --data_path {davis}": "patch tokens",
    "visualize attention shapes": "attention", "visualize features shapes": "patch tokens",
    "retrieve landmarks --data_path {davis}": "any size", "retrieve copies --data_path {davis}": "patch tokens",
    "evaluate linear --data_path {data_path} --avgpool_patchtokens": "--avgpool_patchtokens",
    "evaluate knn --data_path {data_path} --image_size 5000": "5000 x 5000 is not from 1 to 4096 pixels",
    "evaluate finetune --data_path {data_path} --drop_path_rate 0.2": "--drop_path_rate",
    "export --precision mixed": "--precision", "export --heads mean": "--heads", "export --dynamic size": "--dynamic",
    "export --patch_tokens": "--patch_tokens",
    "export --image_size 5000 32": "5000 x 32 is not from 1 to 4096 pixels"}


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    """Model file of an untrained ResNet-18."""
    path = tmp_path_factory.mktemp("resnet") / "teacher.safetensors"
    state = {f"backbone.{name}": value for name, value in HeadlessClassifier("resnet18", 32).state_dict().items()}
    weights.save_model(path, state, dict(backbone=dict(arch="resnet18", img_size=32)))
    return str(path)


@pytest.mark.parametrize("command", UNSUPPORTED)
def test_what_only_a_vit_supports_is_one_line(resnet_file, data_path, tmp_path, exit_message, command):
    davis, (image, _) = tmp_path / "davis", Shapes("test", 1, 48)[0]
    for part, mode in (("JPEGImages", "jpg"), ("Annotations", "png")):
        path = davis / part / "480p" / "cat" / f"0.{mode}"
        path.parent.mkdir(parents=True)
        image.convert("P" if mode == "png" else "RGB").save(path)
    for part, file in (("original", "200000.png"), ("strong", "200000.png"), ("jpg", "a.jpg")):
        (davis / part).mkdir()
        image.save(davis / part / file)
    truth = dict(imlist=["a"], qimlist=["a"], gnd=[dict(bbx=[0, 0, 9, 9], easy=[0], hard=[], junk=[])])
    (davis / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth))
    name, *argv = command.format(davis=davis, data_path=data_path).split()
    script = {"segment": segment, "visualize": visualize, "retrieve": retrieve, "evaluate": evaluate,
              "export": export}[name]
    line = exit_message(lambda *a: script.main(script.parse_args(a)), *argv, "--ckpt", resnet_file)
    assert UNSUPPORTED[command] in line and "unrecognized" not in line


def test_embedding_of_a_resnet_is_drawn(resnet_file, data_path, tmp_path):
    visualize.main(visualize.parse_args(["embedding", "--ckpt", resnet_file, "--data_path", data_path, "--output_dir",
                                         str(tmp_path), "--num_workers", "0", "--device", "cpu"]))
    assert (tmp_path / "teacher.embedding.png").exists()
