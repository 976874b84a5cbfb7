import csv
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import export
import infer
import visualize
from common.weights import CheckpointError, load_backbone, save_model
from data.images import DECODERS, read_image, to_rgb
from data.loaders import center_crop_view, normalize
from evaluation import onnx_parity
from plotting.draw import colorize
from vit import VisionTransformer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    vit = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)
    model = VisionTransformer(**vit).eval()
    for p in model.parameters():  # far from the initial values, so that every path shows in the output
        torch.nn.init.normal_(p, std=0.15) if p.ndim > 1 else torch.nn.init.normal_(p, mean=0.5, std=0.2)
    path = tmp_path / "teacher.safetensors"
    save_model(path, {f"backbone.{k}": v for k, v in model.state_dict().items()},
               dict(arch="vit_tiny", backbone=vit, mean=(0.1, 0.2, 0.3)))
    return path, model


def make(path, *flags):
    export.main(export.parse_args(["--ckpt", str(path), *flags]))
    return path.with_suffix(".onnx")


def metadata(path):
    return {item.key: json.loads(item.value) for item in onnx.load(path).metadata_props}


@pytest.mark.parametrize("flags, height, width", [
    ([], 32, 32), (["--image_size", "48"], 48, 48), (["--image_size", "40", "64", "--opset", "20"], 40, 64)])
def test_onnx_equals_torch(saved, flags, height, width, capsys):
    path, model = saved
    file = make(path, *flags)
    output = capsys.readouterr().out
    assert all(text in output for text in ("CPUExecutionProvider; ", "5 LayerNormalization", "from torch, cosine at"))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["image"]
    assert session.get_inputs()[0].shape == ["batch", 3, height, width]
    assert [o.name for o in session.get_outputs()] == ["features", "attention"]
    for batch in (1, 5):
        x = torch.randn(batch, 3, height, width)
        features, attention = map(torch.from_numpy, session.run(None, {"image": x.numpy()}))
        with torch.no_grad():
            torch.testing.assert_close(features, model(x), rtol=0, atol=1e-4)
            expected = model.get_last_selfattention(x)[:, :, 0, 1:].reshape(batch, 2, height // 8, width // 8)
        torch.testing.assert_close(attention, expected, rtol=0, atol=1e-5)
    values = metadata(file)
    assert values["arch"] == "vit_tiny" and values["image_size"] == [height, width] and values["precision"] == "fp32"
    assert values["mean"] == [0.1, 0.2, 0.3] and len(values["std"]) == 3
    assert values["opset"] == (20 if "--opset" in flags else 18) and values["sha256"] == export.hash_file(path)
    assert set(values["outputs"]) == {"features", "attention"}


def test_all_flags_together(saved):
    path, _ = saved
    file = make(path, "--precision", "mixed", "--opset", "23", "--dynamic", "size", "--heads", "mean", "--patch_tokens",
                "--last_layers", "2", "--normalize", "nhwc")
    shapes = {value.name: value.shape for value in onnxruntime.InferenceSession(file).get_outputs()}
    assert shapes == {"features": ["batch", 64], "attention": ["batch", "rows", "cols"],
                      "patch_tokens": ["batch", "patches", 64], "layer_1": ["batch", "tokens", 64],
                      "layer_2": ["batch", "tokens", 64]}
    assert metadata(file)["image_size"] is None and metadata(file)["layout"] == "nhwc"
    make(path, "--dynamic", "none", "--batch_size", "3", "--precision", "fp16")
    value = onnxruntime.InferenceSession(file).get_inputs()[0]
    assert (value.shape, value.type) == ([3, 3, 32, 32], "tensor(float16)")


def test_four_channels(tmp_path):
    torch.manual_seed(0)
    vit = dict(img_size=32, patch_size=8, in_chans=4, embed_dim=64, depth=1, num_heads=2)
    save_model(tmp_path / "four.safetensors", VisionTransformer(**vit).state_dict(), dict(backbone=vit))
    values = metadata(make(tmp_path / "four.safetensors"))
    assert values["mean"] == values["std"] == [0.5] * 4 and values["channels"] == 4
    assert values["input"] == "value_range in [0, 1] less mean over std"


def change_before_building(monkeypatch, change):
    """Make export.build_onnx build a model whose final norm has been changed."""
    build_onnx = export.build_onnx

    def build(backbone, *args):
        other = VisionTransformer(32, 8, embed_dim=64, depth=2, num_heads=2).eval()
        other.load_state_dict(backbone.state_dict())
        with torch.no_grad():
            change(other.norm)
        return build_onnx(other, *args)

    monkeypatch.setattr(export, "build_onnx", build)


def test_file_that_differs_from_torch_is_not_written(saved, monkeypatch):
    path, _ = saved
    change_before_building(monkeypatch, lambda norm: norm.bias[0].add_(1e-3))
    with pytest.raises(export.ExportError, match="features differs from torch by 0.001, cosine 1.0"):
        make(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_check_verifies_an_existing_file(saved, capsys):
    path, _ = saved
    file = make(path, "--patch_tokens")
    before = file.read_bytes()
    export.main(export.parse_args(["--check", str(file)]))
    assert capsys.readouterr().out.count("patch_tokens float") == 2
    proto = onnx.load(file)
    constants = {constant.name: i for i, constant in enumerate(proto.graph.initializer)}

    def double(name):
        def change(proto):
            constant = proto.graph.initializer[constants[name]]
            constant.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(constant), name))
        return change

    for change, words in (
            (double("norm.bias"), "features differs from torch"), (double("positions"), "differs from torch"),
            (double("cls_token.shape.1"), "cannot run this file of opset 18"),
            (lambda p: p.opset_import[0].CopyFrom(onnx.helper.make_opsetid("", 19)),
             "written in opset {'': 19}, not 18"),
            (lambda p: p.graph.output.pop(), "cannot run this file of opset 18"),
            (lambda p: p.graph.node.pop(3), "cannot run this file of opset 18")):
        corrupt = onnx.ModelProto()
        corrupt.CopyFrom(proto)
        change(corrupt)
        onnx.save(corrupt, file)
        with pytest.raises(export.ExportError, match=words):
            export.main(export.parse_args(["--check", str(file)]))
    file.write_bytes(before)
    weights = load_file(path)
    save_file(weights | {"backbone.norm.bias": weights["backbone.norm.bias"] + 1}, path.with_name("other.safetensors"))
    with pytest.raises(CheckpointError, match="was not exported from .*other.safetensors"):
        export.main(export.parse_args(["--check", str(file), "--ckpt", str(path.with_name("other.safetensors"))]))
    file.write_bytes(before[:1000])
    with pytest.raises(CheckpointError, match="not a file of export.py"):
        export.main(export.parse_args(["--check", str(file)]))


def test_overflow_of_half_precision_is_found(saved):
    """ONNX Runtime computes a mixed file in float32 on a CPU; on a GPU this one would give NaN."""
    path, model = saved
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias[3] = 5e4
        model.blocks[1].mlp.fc2.bias[3] = 5e4
    other = path.with_name("large.safetensors")
    save_model(other, model.state_dict(), dict(
        backbone=dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)))
    make(other)
    with pytest.raises(export.ExportError, match="blocks.1.output leaves the range of half precision"):
        make(other, "--precision", "mixed", "--output", str(path.with_name("mixed.onnx")))
    assert not path.with_name("mixed.onnx").exists()


def test_half_precision_has_its_own_limits(saved, monkeypatch):
    change_before_building(monkeypatch, lambda norm: [p.mul_(1.05) for p in norm.parameters()])
    with pytest.raises(export.ExportError, match="features differs from torch by"):
        make(saved[0], "--precision", "mixed")


def test_images_of_a_folder_are_compared_too(saved, scene, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    scene.save(tmp_path / "images" / "a.png")
    seen, compute_expected = [], onnx_parity.compute_expected
    monkeypatch.setattr(onnx_parity, "compute_expected", lambda backbone, x, *others: (
        seen.append(x) or compute_expected(backbone, x, *others)))
    make(saved[0], "--images", str(tmp_path / "images"))
    crop = infer.prepare(scene, dict(patch_size=8, image_size=[32, 32]))
    expected = torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1) / 255
    mean, std = torch.tensor((0.1, 0.2, 0.3)).view(3, 1, 1), torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    equal = [len(x) for x in seen for image in x if torch.allclose(image, (expected - mean) / std, atol=1e-5)]
    assert sorted(equal) == [1, 2, 2, *[7] * 7]
    assert sorted({len(x) for x in seen}) == [1, 2, 7]


def test_no_file_is_overwritten_by_accident(saved):
    path, _ = saved
    before = path.read_bytes()
    for flags in (["--format", "timm"], []):
        with pytest.raises(CheckpointError, match="is the model itself"):
            make(path, *flags, "--output", str(path))
    with pytest.raises(OSError, match="cannot be written"):
        make(path, "--output", str(path.parent))
    assert path.read_bytes() == before


def test_convolutional_stem_is_exported_for_this_code_alone(tmp_path):
    sizes = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, conv_stem=True)
    model, x = VisionTransformer(**sizes), torch.randn(4, 3, 32, 32)
    model(x)  # other statistics than those of a new one
    path, other = tmp_path / "m.safetensors", tmp_path / "other.safetensors"
    save_model(path, {f"backbone.{k}": v for k, v in model.state_dict().items()}, dict(arch="vit_tiny", backbone=sizes))
    assert metadata(make(path))["patch_size"] == 8
    make(path, "--format", "safetensors", "--output", str(other))
    assert torch.equal(load_backbone(str(other))[0](x), model.eval()(x))
    for name in ("timm", "transformers", "dino", "dino_full", "hub"):
        with pytest.raises(CheckpointError, match=f"--format {name}: the model has a convolutional stem"):
            make(path, "--format", name, "--output", str(tmp_path / "refused"))
    assert {file.name for file in tmp_path.iterdir()} == {"m.safetensors", "m.onnx", "other.safetensors"}


def test_check_finds_the_model_from_any_directory(saved, monkeypatch):
    path, _ = saved
    file = make(path)
    monkeypatch.chdir("/")
    export.main(export.parse_args(["--check", str(file)]))
    path.rename(path.with_name("gone"))
    with pytest.raises(CheckpointError, match="teacher.safetensors as it is now: name its model with --ckpt"):
        export.main(export.parse_args(["--check", str(file)]))


@pytest.mark.parametrize("compile", [
    lambda function: function, pytest.param(torch.compile, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_benchmark_prints_ratios(saved, monkeypatch, capsys, compile):
    monkeypatch.setattr(torch, "compile", compile)
    make(saved[0], "--benchmark", "--batch_size", "2")
    output = capsys.readouterr().out
    assert output.count("img/s, ONNX Runtime is") == 3
    assert "ONNX Runtime is 1.00x as fast" in output and "compiled" in output


def test_benchmark_goes_on_without_a_compiler(saved, monkeypatch, capsys):
    def fail(x):
        raise RuntimeError("no compiler\nand its traceback")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    make(saved[0], "--benchmark")
    output = capsys.readouterr().out
    assert "torch.compile failed here: no compiler\n" in output and output.count("img/s, ONNX Runtime is") == 2


def test_image_size_must_be_a_multiple_of_the_patch_size(saved):
    with pytest.raises(CheckpointError, match="30 32: not multiples of .* 8"):
        make(saved[0], "--image_size", "30", "32")


# ---- infer.py ----

@pytest.mark.parametrize("size", [(97, 61), (61, 97), (32, 48), (20, 20), (301, 64)])
def test_images_are_prepared_as_for_evaluation(scene, size):
    image = scene.resize(size)
    values = dict(patch_size=8, image_size=[48, 32])
    ours = np.asarray(infer.prepare(image, values)) / 255
    expected = center_crop_view(image, (48, 32), (0, 0, 0), (1, 1, 1)).permute(1, 2, 0)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    whole = infer.prepare(image, values | {"image_size": None})
    assert whole.size == (size[0] // 8 * 8, size[1] // 8 * 8)


def test_exif_orientation_is_applied(scene, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    scene.save(tmp_path / "rotated.png", exif=exif)
    whole = infer.prepare(Image.open(tmp_path / "rotated.png"), dict(patch_size=2, image_size=None))
    assert np.array_equal(np.asarray(whole), np.rot90(np.asarray(scene), -1)[:96, :60])


def with_transparency(scene, mode):
    image = scene.convert(mode)
    image.info["transparency"] = {"P": 7, "L": 100, "RGB": scene.getpixel((5, 5)), "1": 0}[mode]
    return image


def images_of_many_modes(scene):
    """{description: PIL image}: every mode that a decoder or a program may hand over."""
    gray = np.asarray(scene.convert("L"))
    alpha = Image.fromarray(np.linspace(0, 255, gray.size).reshape(gray.shape).astype("uint8"))
    deep = (gray.astype("uint16") << 8) + np.arange(gray.shape[1], dtype="uint16")
    rgba, palette_alpha = scene.convert("RGBA"), scene.convert("P").convert("PA")
    rgba.putalpha(alpha)
    palette_alpha.putalpha(alpha)
    images = {mode: scene.convert(mode) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB", "RGBX")}
    images |= {"RGBA": rgba, "LA": rgba.convert("LA"), "PA": palette_alpha, "RGBa": rgba.convert("RGBa")}
    images |= {f"{mode} with transparency": with_transparency(scene, mode) for mode in ("1", "L", "P", "RGB")}
    images |= {f"I;16{order}": Image.frombytes(f"I;16{order}", scene.size, deep.astype(dtype).tobytes())
               for order, dtype in (("", "<u2"), ("B", ">u2"), ("L", "<u2"))}
    for name, values in (("8 bits", gray), ("16 bits", deep), ("negative and above 16 bits", deep * 4.0 - 10_000)):
        images |= {f"{mode}, {name}": Image.fromarray(values.astype(dtype))
                   for mode, dtype in (("I", "int32"), ("F", "float32"))}
    return images | {"F, 0 to 1": Image.fromarray(gray.astype("float32") / 255)}


def test_every_mode_becomes_the_same_rgb_as_in_training(scene):
    for name, image in images_of_many_modes(scene).items():
        assert image.mode == name.split()[0].rstrip(",")
        assert np.array_equal(np.asarray(infer.to_rgb(image)), np.asarray(to_rgb(image))), name


@pytest.mark.parametrize("value_range", [None, (-100, 5000)])
def test_every_file_is_prepared_as_for_evaluation(scene, tmp_path, value_range):
    """To the bit, for every mode that each file format can hold, upright and on its side."""
    metadata = dict(patch_size=8, image_size=[32, 24], value_range=value_range)
    endings, exif = {".png", ".tif", ".jpg", ".webp", ".gif", ".bmp", ".ppm", ".jp2", ".avif", ".qoi"}, Image.Exif()
    exif[0x0112], read = 6, set()
    for (name, image), ending in itertools.product(images_of_many_modes(scene).items(), endings):
        path = tmp_path / f"a{ending}"
        try:
            image.save(path, **({"exif": exif} if ending in (".png", ".tif", ".jpg", ".webp") else {}))
            Image.open(path).load()
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # not a mode of this format, or of this Pillow
            continue
        read.add((name, ending))
        expected = center_crop_view(read_image(path, value_range=value_range), (32, 24))
        with Image.open(path) as opened:
            prepared = infer.prepare(opened, metadata)
        assert torch.equal(normalize(prepared), expected), (name, ending)
    assert len(read) > 80 and {ending for _, ending in read} >= endings - {".avif", ".jp2"}


def test_to_rgb_scales_16_bits_and_composites_on_white():
    deep = Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype("uint16"))
    gray = np.asarray(infer.to_rgb(deep))[:, :, 0]
    assert gray.min() == 0 and gray.max() == 255 and abs(gray.mean() - 127.5) < 1
    assert np.asarray(infer.to_rgb(Image.new("RGBA", (16, 16), (0, 0, 0, 0)))).min() == 255


def test_infer_does_not_wait_for_pipes(saved, scene, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.png")
    scene.save(tmp_path / "a.png")
    images = [str(tmp_path / "pipe.png"), "/dev/zero", str(tmp_path / "a.png")]
    assert infer.main([str(make(saved[0])), *images, "--output", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("no such file, or a pipe or device") == 2 and "a.png: features [64]" in printed.out


def test_sizes_of_images_for_a_model_of_any_size():
    values = dict(patch_size=8, image_size=None)
    assert infer.prepare(Image.new("RGB", (4000, 3000)), values).size == (584, 440)  # 4015 patches
    with pytest.raises(ValueError, match="less than a patch"):
        infer.prepare(Image.new("RGB", (7, 30)), values)


def test_infer_is_interrupted_in_one_line(saved, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    command = [sys.executable, "infer.py", str(make(saved[0])), *[str(tmp_path / "a.png")] * 5000]
    process = subprocess.Popen([*command, "--output", str(tmp_path / "out")], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, cwd=Path(infer.__file__).parent)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert (process.returncode, error) == (130, "infer.py: interrupted\n")


@pytest.fixture
def classifier(saved):
    """A function: a classifier.safetensors on CLS tokens of n blocks and, with avgpool, the mean patch token."""
    path, model = saved

    def save(n=1, avgpool=False):
        weights = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
        weights |= {"classifier.weight": torch.randn(3, 64 * (n + avgpool)), "classifier.bias": torch.randn(3)}
        vit = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)
        save_model(path.with_name("classifier.safetensors"), weights, dict(
            backbone=vit, mean=(0.1, 0.2, 0.3), classes=["red fox", "☃", "dog"], image_size=40, n_last_blocks=n,
            avgpool_patchtokens=avgpool))
        return path.with_name("classifier.safetensors"), weights["classifier.weight"], weights["classifier.bias"]
    return save


@pytest.mark.parametrize("n, avgpool, flags", [
    (1, False, []), (2, True, ["--precision", "mixed"]), (1, True, ["--precision", "fp16", "--patch_tokens"]),
    (2, False, ["--dynamic", "size", "--opset", "23", "--last_layers", "2"])])
def test_logits_of_a_classifier_equal_torch(saved, classifier, capsys, n, avgpool, flags):
    """At the size of its training, with class names in the metadata."""
    path, weight, bias = classifier(n, avgpool)
    file = make(path, *flags)
    values, x = metadata(file), torch.randn(2, 3, 40, 40)
    assert values["classes"] == ["red fox", "☃", "dog"] and "logits" in values["outputs"]
    assert values["image_size"] == (None if "size" in flags else [40, 40])
    half = torch.float16 if "fp16" in flags else torch.float32
    logits, = onnxruntime.InferenceSession(file).run(["logits"], {"image": x.to(half).numpy()})
    with torch.no_grad():
        tokens = saved[1].get_intermediate_layers(x, n)
        parts = [t[:, 0] for t in tokens] + [tokens[-1][:, 1:].mean(dim=1)] * avgpool
    expected = torch.cat(parts, dim=1) @ weight.T + bias
    atol = 0.02 * expected.abs().max().item() if "--precision" in flags else 1e-4
    torch.testing.assert_close(torch.from_numpy(logits).float(), expected, rtol=0, atol=atol)
    capsys.readouterr()
    export.main(export.parse_args(["--check", str(file)]))
    assert capsys.readouterr().out.count("logits float") == 1


def test_the_backbone_of_a_classifier_is_exported_alone(classifier):
    path = classifier()[0]
    backbone = path.with_name("backbone.safetensors")
    make(path, "--format", "safetensors", "--output", str(backbone))
    assert load_file(backbone).keys() == {name for name in load_file(path) if name.startswith("backbone.")}
    values = metadata(make(backbone))
    assert values["classes"] is None and values["outputs"].keys() == {"features", "attention"}


def test_wrong_logits_are_not_written(classifier, monkeypatch):
    path, _, _ = classifier(2, True)
    build_onnx = export.build_onnx

    def build(backbone, metadata, args, network):
        network.heads[0].weight.data[0] = network.heads[0].weight.data[0].roll(64)  # the parts in another order
        model = build_onnx(backbone, metadata, args, network)
        network.heads[0].weight.data[0] = network.heads[0].weight.data[0].roll(-64)
        return model

    monkeypatch.setattr(export, "build_onnx", build)
    for precision in ("fp32", "mixed"):
        with pytest.raises(export.ExportError, match="logits differs from torch by"):
            make(path, "--precision", precision)
    assert not path.with_suffix(".onnx").exists()


def test_classes_and_features_are_printed_and_written(saved, classifier, scene, tmp_path, monkeypatch, capsys):
    path, weight, bias = classifier()
    monkeypatch.chdir(tmp_path)
    make(path)
    images = ["a.png", "bad.png", "ünï, b.png"]
    scene.save(images[0])
    scene.rotate(180).save(images[2])
    Path("bad.png").write_bytes(b"bad")
    x = torch.stack([center_crop_view(Image.open(name), 40) for name in images[::2]])
    shift = (torch.tensor((0.485, 0.456, 0.406)) - torch.tensor((0.1, 0.2, 0.3))) / torch.tensor((0.229, 0.224, 0.225))
    with torch.no_grad():
        features = saved[1](x + shift.view(3, 1, 1))  # the model has another mean than center_crop_view
    probabilities = (features @ weight.T + bias).softmax(dim=1)
    names, lines = ["red fox", "☃", "dog"], []
    for values in probabilities:
        order = values.argsort(descending=True).tolist()
        lines.append("  " + ", ".join(f"{names[i]} {values[i]:.1%}" for i in order))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))  # of Windows, or into a file
    assert infer.main(["classifier.onnx", images[2], "--output", "features.csv"]) == 0
    sys.stdout.seek(0)
    assert sys.stdout.read().startswith(r"\xfcn\xef, b.png: features [64]") and Path("features.csv").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert infer.main(["classifier.onnx", *images]) == 2  # of the corrupt image
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1:5:3] == lines and captured.err.startswith("infer.py: bad.png: ")
    assert len(list(tmp_path.glob("*.attention.png"))) == 2
    for name in ("new/features.npy", "features.csv"):
        assert infer.main(["classifier.onnx", *images, "--output", name]) == 2
    assert len(list(tmp_path.glob("**/*.attention.png"))) == 2  # no more of them
    array = np.load("new/features.npy")
    assert array.dtype == np.float32 and np.isnan(array[1]).all()
    np.testing.assert_allclose(array[::2], features, atol=1e-4)
    with open("features.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:5] == ["file", "class", *(f"probability_{name}" for name in names)] and len(header) == 5 + 64
    assert header[5] == "feature_0" and [row[0] for row in rows] == images[::2]
    assert [row[1] for row in rows] == [names[i] for i in probabilities.argmax(dim=1)]
    np.testing.assert_allclose(np.array([row[2:] for row in rows], float), torch.cat((probabilities, features), 1),
                               atol=1e-4)
    make(saved[0])
    assert infer.main(["teacher.onnx", "a.png", "--output", "features.csv"]) == 0  # without classes
    assert Path("features.csv").read_text().startswith("file,feature_0,")
    assert infer.main(["teacher.onnx", "a.png", "--output", "a.png/x.npy"]) == 2
    assert "infer.py: --output a.png/x.npy: " in capsys.readouterr().err


WITHOUT_TORCH = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "onnx", "safetensors", "tqdm", "vit"} or name.startswith(
                "common."):  # common itself checks the version of Python
            raise ImportError(name + " is not needed here")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", [["infer.py"], ["export.py", "run"]])
@pytest.mark.parametrize("flags", [
    [], ["--precision", "fp16", "--heads", "mean", "--dynamic", "none", "--batch_size", "2"],
    ["--normalize", "nhwc", "--dynamic", "size"]])
def test_inference_needs_infer_py_alone(saved, tmp_path, scene, script, flags):
    """With onnxruntime, numpy and Pillow; every other import fails."""
    path, model = saved
    file = make(path, *flags)
    place = tmp_path / "place"
    place.mkdir()
    (place / "common").mkdir()
    for name in ["infer.py"] if len(script) == 1 else ["infer.py", "export.py", "common/__init__.py"]:
        shutil.copy(ROOT / name, place / name)
    shutil.copy(file, place)
    scene.save(place / "dog.png")
    result = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *script, file.name, "dog.png"], cwd=place, text=True,
                            capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "dog.png: features [64]\n  attention [" in result.stdout
    sheet = Image.open(place / "dog.png.attention.png")
    side = (240, 140) if "size" in flags else (240, 240)  # 12 x 7 or 4 x 4 patches, enlarged
    rows = 1 if "mean" in flags else 2  # image and map, or image and two maps in two columns
    assert sheet.size == (2 * (side[0] + 8) - 8, rows * (side[1] + 24))
    session, values = infer.open_model(str(file))
    image = infer.prepare(Image.open(place / "dog.png"), values)
    features, attention = infer.infer(session, values, image)
    x = center_crop_view(image, image.size[::-1])
    x = x * torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1) + torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    x = (x - torch.tensor(values["mean"]).view(3, 1, 1)) / torch.tensor(values["std"]).view(3, 1, 1)
    with torch.no_grad():
        expected, maps = model.forward_with_attention(x[None])
    assert torch.cosine_similarity(torch.from_numpy(features.astype("float32")), expected[0], dim=0) > 0.9999
    maps = maps[0].unflatten(1, [side // 8 for side in image.size[::-1]])
    np.testing.assert_allclose(attention, maps.mean(0) if "mean" in flags else maps, atol=2e-3)
    first = (maps.mean(0) if "mean" in flags else maps[0]).numpy()
    left, patch = side[0] + 8, side[1] // len(first)
    drawn = np.asarray(sheet, int)[patch // 2:side[1]:patch, left + patch // 2:left + side[0]:patch]
    expected = np.asarray(colorize(first, first.shape[::-1]), int)  # the colors of the sheets of visualize.py
    assert drawn.shape == expected.shape and np.abs(drawn - expected).max() <= (4 if "fp16" in flags else 1)
    below = np.asarray(sheet.convert("L"))[side[1]:side[1] + 24]  # captions: image, and head 1 with its maximum
    assert below[:, :100].min() < 100 and below[:, left:left + 120].min() < 100 and below[:, left + 180:].min() == 255


@pytest.mark.parametrize("argv, words", [
    (["missing.onnx", "dog.png"], "missing.onnx: not a file of export.py"),
    (["dog.png", "dog.png"], "dog.png: not a file of export.py"), (["teacher.onnx", "missing.png"], "missing.png"),
    (["teacher.onnx", "teacher.onnx"], "cannot identify image file")])
def test_errors_are_one_line_and_status_2(saved, scene, monkeypatch, capfd, argv, words):
    monkeypatch.chdir(saved[0].parent)
    make(saved[0])
    scene.save("dog.png")
    onnxruntime.set_default_logger_severity(4)  # it logs to stderr too
    capfd.readouterr()
    assert infer.main(argv) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("infer.py: ") and words in lines[0]


def test_metadata_of_strangers_is_checked(saved, scene, monkeypatch, capfd):
    """infer.py, visualize.py attention and export.py --check end in one line for values that export.py never writes."""
    monkeypatch.chdir(saved[0].parent)
    good = metadata(make(saved[0]))
    scene.save("dog.png")
    onnxruntime.set_default_logger_severity(4)
    proto = onnx.load("teacher.onnx")
    wrong = {"patch_size": [None, 0, -8, 8.0, "8", True, 10**9], "image_size": [32, [32], [32, 0], ["a", "b"], {}],
             "batch_size": [0, "1", [1]], "mean": [1, [1, 2], [0, 0, "x"], [0, 0, float("nan")], [0, 0, 10**400]],
             "std": [[1, 1, 0], [1, 1, -1], {}], "layout": [None, "chw", []], "outputs": [None, [], {}, {"cls": ""}, 7],
             "precision": ["int4", None], "heads": ["one", 3], "last_layers": [-1, 1.5], "checkpoint": [7, None],
             "channels": [0, "3", [3]],
             "trained_size": [None, "224"], "classes": ["cat", [1]]}
    for key, values in wrong.items():
        for value in values:
            texts = {name: json.dumps(value) for name, value in (good | {key: value}).items()}
            with pytest.raises(ValueError, match=f"its metadata has {key} "):
                infer.read_metadata(texts)
    assert infer.read_metadata({name: json.dumps(value) for name, value in good.items()}) == good
    others = dict(image_size=[40, 32]), dict(outputs={"features": "", "cls": ""}), dict(std=[])
    for i, other in enumerate(others):  # the first and second are valid, but not of this model
        onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in (good | other).items()})
        onnx.save(proto, "other.onnx")
        capfd.readouterr()
        assert infer.main(["other.onnx", "dog.png"]) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and (i == 0 or "other.onnx: not a file of export.py that can be run" in error)
        with pytest.raises(CheckpointError, match="other.onnx: (cannot run on 32 x 40 pixels|not a file of export.py)"):
            visualize.main(visualize.parse_args(["attention", "dog.png", "--ckpt", "other.onnx"]))
        with pytest.raises((CheckpointError, export.ExportError), match="other.onnx|cannot run this file"):
            export.main(export.parse_args(["--check", "other.onnx"]))
    infer_grayscale = infer.read_metadata({name: json.dumps(value) for name, value in (good | {"mean": None}).items()})
    with pytest.raises(ValueError, match="the model does not take RGB images"):
        infer.infer(infer.open_model("teacher.onnx")[0], infer_grayscale, Image.new("RGB", (32, 32)))


def test_missing_arguments_are_one_line_and_status_2(capsys):
    for argv in ([], ["teacher.onnx"], ["teacher.onnx", "a.png", "--output"]):
        with pytest.raises(SystemExit) as stop:
            infer.main(argv)
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("infer.py: error: ")


def test_outputs_go_to_the_current_or_the_given_folder(saved, scene, tmp_path, monkeypatch, capsys):
    """Under names that are unique, never beside the image; without a folder to write to, features are printed."""
    file, place = str(make(saved[0])), tmp_path / "place"
    images = [tmp_path / "data" / folder / "dog.png" for folder in "abc"]
    for folder in (place, *(image.parent for image in images)):
        folder.mkdir(parents=True)
    for i, image in enumerate(images):
        scene.rotate(90 * i, expand=True).save(image)
    monkeypatch.chdir(place)
    assert infer.main([file, *map(str, images)]) == 0
    names = ["dog.png.2.attention.png", "dog.png.3.attention.png", "dog.png.attention.png"]
    assert sorted(path.name for path in place.iterdir()) == names
    assert infer.main([file, str(images[0]), "--output", "new/maps", str(images[2])]) == 0
    assert sorted(path.name for path in (place / "new" / "maps").iterdir()) == [names[0], names[2]]
    for written, alone in (("dog.png", 0), ("dog.png.2", 2)):
        assert infer.main([file, str(images[alone]), "--output", "alone"]) == 0
        expected = (place / "alone" / "dog.png.attention.png").read_bytes()
        assert (place / "new" / "maps" / f"{written}.attention.png").read_bytes() == expected
    capsys.readouterr()
    assert infer.main([file, str(images[0]), "--output", file]) == 2
    captured = capsys.readouterr()
    assert captured.out == f"{images[0]}: features [64]\n" and "File exists" in captured.err
    assert sorted(tmp_path.glob("data/**/*.*")) == images


def test_formats_are_those_of_training(saved, scene, tmp_path, monkeypatch, capsys):
    """Pillow alone would start Ghostscript for EPS, whatever the file is called."""
    assert infer.DECODERS == DECODERS and {"JPEG", "GIF"} <= {*DECODERS} and "EPS" not in DECODERS
    monkeypatch.chdir(tmp_path)
    file = str(make(saved[0]))
    for name, kind in (("a.eps", "EPS"), ("b.jpg", "EPS"), ("c.pdf", "PDF"), ("noending", "GIF")):
        scene.save(name, kind)
    capsys.readouterr()
    assert infer.main([file, "a.eps", "b.jpg", "c.pdf", "noending"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("cannot identify image file") == 3 and captured.out.startswith("noending: features")


def test_corrupt_and_missing_images_are_skipped(saved, scene, monkeypatch, capsys):
    monkeypatch.chdir(saved[0].parent)
    make(saved[0])
    scene.save("dog.png")
    assert infer.main(["teacher.onnx", "missing.png", "dog.png"]) == 2 and Path("dog.png.attention.png").exists()
