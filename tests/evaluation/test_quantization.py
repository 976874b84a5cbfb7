"""INT8 files against torch, through export.py and ONNX Runtime."""

import re
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import export
import infer
from common import cli
from common.weights import save_model
from data.datasets import Data, DataError, open_data
from data.loaders import center_crop_view
from data.shapes import Shapes
from evaluation import quantization
from evaluation.knn import knn_classifier
from vit import VisionTransformer

VIT = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4)


def save(path, change=lambda model: None):
    torch.manual_seed(0)
    model = VisionTransformer(**VIT).eval()
    with torch.no_grad():
        for p in model.parameters():  # far from the initial values, so that every path shows in the output
            torch.nn.init.normal_(p, std=0.15) if p.ndim > 1 else torch.nn.init.normal_(p, mean=0.5, std=0.2)
        change(model)
    save_model(path, {f"backbone.{k}": v for k, v in model.state_dict().items()},
               dict(backbone=VIT, data_path="/others"))
    return model


def scale_a_channel(model, bias=0.0):
    """The same outputs from activations and weights that 8 bits cannot hold, then a constant that hides the error."""
    for block in model.blocks:
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            norm.weight[0] *= 1e4
            norm.bias[0] *= 1e4
            linear.weight[:, 0] /= 1e4
    model.norm.bias += bias


@pytest.fixture
def path(tmp_path):
    return tmp_path / "teacher.safetensors"


def test_held_out_images_are_not_calibrated_on(tmp_path, scene):
    for i in range(20):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        scene.rotate(i).resize((32, 32)).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    data = open_data(str(tmp_path))
    calibration, (train, val) = quantization.split_images(data)
    pixels = [{np.asarray(images[i][0]).tobytes() for i in range(len(images))} for images in (calibration, train, val)]
    assert pixels[0] == pixels[1] and pixels[2] and not pixels[0] & pixels[2]
    assert len(pixels[0] | pixels[2]) == 20


def run_export(path, *flags):
    export.main(export.parse_args(["--ckpt", str(path), "--precision", "int8", *flags]))
    return path.with_suffix(".onnx")


def extract(file, images):
    """Features of the file, by infer.py."""
    session, metadata = infer.open_model(str(file))
    return torch.stack([torch.from_numpy(infer.infer(session, metadata, infer.prepare(images[i][0], metadata))[0])
                        for i in range(len(images))])


def test_figures_of_the_report_are_those_of_the_file(path, small_shapes, capsys):
    model = save(path)
    file = run_export(path, "--data_path", "shapes", "--dynamic", "none", "--batch_size", "7")
    output = capsys.readouterr().out
    proto = onnx.load(file)
    weights = {c.name: onnx.numpy_helper.to_array(c) for c in proto.graph.initializer}
    weights = {name: w for name, w in weights.items() if w.dtype == np.int8 and w.ndim == 2}
    assert len(weights) == 12 and max(abs(w.astype(int)).max() for w in weights.values()) == 64, "7 bits"
    assert not any(name.startswith("patch_embed") for name in weights)
    train, val = Shapes("train", 300, 32), Shapes("test", 60, 32)
    quantized = [extract(file, images) for images in (train, val)]
    with torch.no_grad():
        exact = [model(torch.stack([center_crop_view(images[i][0], 32) for i in range(len(images))]))
                 for images in (train, val)]
    labels = [torch.arange(len(images)) % 8 for images in (train, val)]
    knn = [knn_classifier(x[0], labels[0], x[1], labels[1], ks=(20,))[20][0] for x in (quantized, exact)]
    cosines = F.cosine_similarity(quantized[1], exact[1])
    assert 0.99 < cosines.min() < 0.99999
    least, mean, *accuracies = map(float, re.search(
        r"int8, static: cosine at least (\S+), mean (\S+) on 60 images; k-NN (\S+)%, fp32 (\S+)%", output).groups())
    assert least == pytest.approx(cosines.min().item(), abs=1e-4)
    assert mean == pytest.approx(cosines.mean().item(), abs=1e-4)
    assert accuracies == pytest.approx(knn, abs=0.1)
    assert re.search(r"batch 7: \S+ img/s, fp32 \S+ img/s, \S+x as fast", output)
    export.main(export.parse_args(["--check", str(file), "--data_path", "shapes"]))
    assert f"cosine at least {least:.4f}, mean {mean:.4f} on 60 images" in capsys.readouterr().out
    with pytest.raises(DataError, match="trained on /others; name images"):
        export.main(export.parse_args(["--check", str(file)]))
    constant = next(c for c in proto.graph.initializer if c.name == "norm.bias")
    constant.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(constant), "norm.bias"))
    onnx.save(proto, file)
    with pytest.raises(export.ExportError, match="cosine at least -?0"):
        export.main(export.parse_args(["--check", str(file), "--data_path", "shapes"]))


def test_pixels_and_folders_without_labels(path, scene, tmp_path, capsys):
    model = save(path)
    (tmp_path / "images").mkdir()
    for i in range(5):
        scene.rotate(30 * i).save(tmp_path / "images" / f"{i}.png")
    for name in ("0.jpg", "5.jpg", "6.jpg"):
        (tmp_path / "images" / name).write_bytes(b"no image")
    file = run_export(path, "--data_path", str(tmp_path / "images"), "--normalize", "nhwc", "--dynamic", "size")
    output = capsys.readouterr().out
    assert "on 3 images\n" in output, "those between the calibration images"
    assert "k-NN was not compared" in output and "skipped 1 corrupt images, the first: " in output
    image = Image.open(tmp_path / "images" / "1.png")
    pixels = np.asarray(infer.prepare(image, dict(patch_size=8, image_size=[32, 48])))
    session, _ = infer.open_model(str(file))
    features = torch.from_numpy(session.run(["features"], {"image": pixels[None]})[0])
    with torch.no_grad():
        expected = model(center_crop_view(image, (32, 48))[None])
    assert F.cosine_similarity(features, expected) > 0.99


@pytest.mark.parametrize("bias, words", [
    (0.0, r"static: cosine at least -?0\.\d+, mean -?0\.\d+ on 60 images; k-NN .*; dynamic: cosine at least .*"),
    (20.0, r"static: cosine at least (0\.99\d+|1\.0+), .*; dynamic: cosine at least (0\.99\d+|1\.0+), .*")])
def test_inaccurate_files_are_refused(path, small_shapes, exit_message, bias, words, capsys):
    save(path, lambda model: scale_a_channel(model, bias))
    path.with_suffix(".onnx").write_bytes(b"earlier")

    def main(*flags):
        cli.run_command(lambda args: run_export(path, *flags), lambda: None, export.ExportError)

    with pytest.raises(SystemExit) as stop:
        main("--data_path", "shapes")
    error, = [line for line in capsys.readouterr().err.splitlines() if "refused" in line]
    assert stop.value.code == 2
    assert re.search(rf"int8 is refused, {words} \(allowed 0.99 and 1.7 points\); export --precision fp32$", error)
    assert path.with_suffix(".onnx").read_bytes() == b"earlier" and len([*path.parent.iterdir()]) == 2
    with pytest.raises(SystemExit):
        main("--data_path", "shapes", "--format", "hub", "--output", str(path.parent / "hub"))
    assert not (path.parent / "hub").exists()


def test_dynamic_where_images_leave_the_calibrated_range(path):
    def shrink_tokens(model):  # so that the norms return little for an image without contrast
        model.patch_embed.proj.weight *= 0.01
        for name, p in model.named_parameters():
            if "bias" in name or name in ("pos_embed", "cls_token"):
                p *= 1e-5

    model = save(path, shrink_tokens)
    file = path.with_suffix(".onnx")
    export.main(export.parse_args(["--ckpt", str(path)]))
    session, metadata = infer.open_model(str(file))
    flat = [(Image.new("RGB", (32, 32), (124, 116, 104)), 0)] * 3  # the mean color: zeros after normalization
    shapes = Shapes("train", 80, 32), Shapes("test", 40, 32)
    _, lines = quantization.quantize(model, file.read_bytes(), metadata, Data(flat, flat, shapes[1], "", ""))
    assert lines[0].startswith("int8, dynamic: cosine at least 0.99")
    _, lines = quantization.quantize(model, file.read_bytes(), metadata, Data(shapes[0], *shapes, "", ""))
    assert lines[0].startswith("int8, static: cosine at least 0.99")
    mixed = flat[:1] * 100
    mixed[51] = shapes[0][0]  # one of the 50 that are compared
    with pytest.raises(export.ExportError, match=r"cosine at least -?0\.[0-8]\d+, mean 0.99.* on 50 images"):
        quantization.check_accuracy(model, quantization.quantize_products(file.read_bytes(), iter([
            {"image": center_crop_view(flat[0][0], 32)[None].numpy()}])), metadata, Data(mixed, None, None, "", ""))
    _, lines = quantization.quantize(model, file.read_bytes(), metadata, Data(mixed, None, None, "", ""))
    assert lines[0].startswith("int8, dynamic: cosine at least 0.99")
    with pytest.raises(export.ExportError, match="1 is too few"):
        quantization.quantize(model, file.read_bytes(), metadata, Data(flat[:1], None, None, "", ""))


def test_logits_are_compared(path, small_shapes, capsys):
    model = save(path)
    weights = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    weights |= {"classifier.weight": torch.randn(3, 64), "classifier.bias": torch.randn(3)}
    save_model(path, weights, dict(backbone=VIT, classes=["a", "b", "c"], image_size=32, n_last_blocks=1,
                                   avgpool_patchtokens=False))
    file = run_export(path, "--data_path", "shapes")
    agreement = float(re.search(r"class of logits as in fp32 on (\S+)%", capsys.readouterr().out)[1])
    x = torch.stack([center_crop_view(Shapes("test", 60, 32)[i][0], 32) for i in range(60)])
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    logits = torch.from_numpy(session.run(["logits"], {"image": x.numpy()})[0])
    with torch.no_grad():
        expected = model(x) @ weights["classifier.weight"].T + weights["classifier.bias"]
    assert agreement == pytest.approx(100 * (logits.argmax(1) == expected.argmax(1)).float().mean().item(), abs=0.1)
    proto = onnx.load(file)
    constant = next(c for c in proto.graph.initializer if c.name == "logits.weight")
    constant.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(constant), "logits.weight"))
    onnx.save(proto, file)
    with pytest.raises(export.ExportError, match=r"class of logits as in fp32 on .* \(allowed .* and 98%\)"):
        export.main(export.parse_args(["--check", str(file), "--data_path", "shapes"]))


def test_batches_are_smaller_where_attention_is_large():
    """64 at 224 pixels; at 480 pixels and patches of 8 an attention matrix of 6 heads has 78 million values."""
    values = dict(batch_size=None, trained_size=224)
    for size, p, expected in ((224, 16, 64), (224, 8, 18), (480, 8, 1)):
        model = SimpleNamespace(patch_size=p, num_heads=6)
        assert quantization.calibration_batch_size(model, values | dict(image_size=[size, size])) == expected
    assert quantization.calibration_batch_size(model, dict(batch_size=7, image_size=[480, 480])) == 7


def test_data_of_a_named_model_must_be_named(path, exit_message):
    save(path)
    assert "name images to calibrate and compare on with --data_path" in exit_message(run_export, path)
    for flags in (["--format", "timm"], ["--precision", "fp32", "--data_path", "shapes"]):
        assert re.search("--precision is of ONNX files|--data_path is for --precision int8",
                         exit_message(run_export, path, *flags))
