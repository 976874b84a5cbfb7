import json
import shutil
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
from common.weights import CheckpointError, save_model
from data.loaders import center_crop_view
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
    said = capsys.readouterr().out
    assert "CPUExecutionProvider; " in said and "5 LayerNormalization" in said and "from torch, cosine at least" in said
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
    about = metadata(file)
    assert about["arch"] == "vit_tiny" and about["image_size"] == [height, width] and about["precision"] == "fp32"
    assert about["mean"] == [0.1, 0.2, 0.3] and len(about["std"]) == 3 and about["opset"] == 20 - 2 * (len(flags) < 5)
    assert about["sha256"] == export.sha256(path) and set(about["outputs"]) == {"features", "attention"}


def test_everything_at_once(saved, capsys):
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


def test_other_numbers_of_channels(tmp_path):
    torch.manual_seed(0)
    vit = dict(img_size=32, patch_size=8, in_chans=4, embed_dim=64, depth=1, num_heads=2)
    save_model(tmp_path / "four.safetensors", VisionTransformer(**vit).state_dict(), dict(backbone=vit))
    about = metadata(make(tmp_path / "four.safetensors"))
    assert about["mean"] is None and about["input"] == "as trained"


def write_another(monkeypatch, change):
    """From here on export.write writes a model whose final norm has been changed."""
    whole = export.write

    def write(backbone, *args):
        other = VisionTransformer(32, 8, embed_dim=64, depth=2, num_heads=2).eval()
        other.load_state_dict(backbone.state_dict())
        with torch.no_grad():
            change(other.norm)
        whole(other, *args)

    monkeypatch.setattr(export, "write", write)


def test_a_file_that_differs_is_refused(saved, monkeypatch):
    path, _ = saved
    write_another(monkeypatch, lambda norm: norm.bias[0].add_(1e-3))
    with pytest.raises(export.ExportError, match="features differs from torch by 0.001, cosine 1.0"):
        make(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_check_repeats_the_gate(saved, capsys):
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
            (double("cls_token.sides"), "no ONNX file that can be run"),
            (lambda p: p.opset_import[0].CopyFrom(onnx.helper.make_opsetid("", 19)),
             "written in {'': 19}, not in opset 18"),
            (lambda p: p.graph.output.pop(), "outputs .* instead of"),
            (lambda p: p.graph.node.pop(3), "no ONNX file that can be run")):
        damaged = onnx.ModelProto()
        damaged.CopyFrom(proto)
        change(damaged)
        onnx.save(damaged, file)
        with pytest.raises(export.ExportError, match=words):
            export.main(export.parse_args(["--check", str(file)]))
    file.write_bytes(before)
    weights = load_file(path)
    save_file(weights | {"backbone.norm.bias": weights["backbone.norm.bias"] + 1}, path.with_name("other.safetensors"))
    with pytest.raises(CheckpointError, match="was not made from .*other.safetensors, whose checksum is another"):
        export.main(export.parse_args(["--check", str(file), "--ckpt", str(path.with_name("other.safetensors"))]))
    file.write_bytes(before[:1000])
    with pytest.raises(CheckpointError, match="not a file of export.py"):
        export.main(export.parse_args(["--check", str(file)]))


def test_half_precision_that_is_not_enough_is_found(saved):
    """On a CPU ONNX Runtime computes a mixed file in float32; on a GPU this one would give NaN."""
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


def test_half_precision_has_limits_too(saved, monkeypatch):
    write_another(monkeypatch, lambda norm: [p.mul_(1.05) for p in norm.parameters()])
    with pytest.raises(export.ExportError, match="features differs from torch by"):
        make(saved[0], "--precision", "mixed")


def test_the_users_pictures_are_compared_on_too(saved, scene, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    scene.save(tmp_path / "pictures" / "a.png")
    seen, compute = [], export.compute
    monkeypatch.setattr(export, "compute", lambda backbone, images, about: seen.append(images) or compute(
        backbone, images, about))
    make(saved[0], "--images", str(tmp_path / "pictures"))
    about = dict(patch_size=8, image_size=[32, 32])
    expected = torch.from_numpy(np.asarray(infer.prepare(scene, about)).copy()).permute(2, 0, 1) / 255
    mean, std = torch.tensor((0.1, 0.2, 0.3)).view(3, 1, 1), torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    alike = [len(x) for x in seen for picture in x if torch.allclose(picture, (expected - mean) / std, atol=1e-5)]
    assert sorted(alike) == [1, 2, 2, *[7] * 7]
    assert sorted({len(x) for x in seen}) == [1, 2, 7]


def test_nothing_that_is_there_is_lost(saved):
    path, _ = saved
    whole = path.read_bytes()
    for flags in (["--format", "timm"], []):
        with pytest.raises(CheckpointError, match="is the model itself"):
            make(path, *flags, "--output", str(path))
    with pytest.raises(CheckpointError, match="is a folder"):
        make(path, "--output", str(path.parent))
    path.with_suffix(".onnx.tmp").write_text("mine")
    make(path)
    assert path.read_bytes() == whole and path.with_suffix(".onnx.tmp").read_text() == "mine"


def test_damaged_descriptions_and_models_elsewhere(saved, monkeypatch):
    path, _ = saved
    file = make(path)
    proto = onnx.load(file)
    for key, value, error in (("precision", "int4", CheckpointError), ("image_size", [32], CheckpointError),
                              ("mean", [0, 0, 0], export.ExportError), ("outputs", None, CheckpointError)):
        damaged = onnx.ModelProto()
        damaged.CopyFrom(proto)
        next(item for item in damaged.metadata_props if item.key == key).value = json.dumps(value)
        onnx.save(damaged, file)
        with pytest.raises(error, match="its description is not one|says mean"):
            export.main(export.parse_args(["--check", str(file)]))
    onnx.save(proto, file)
    monkeypatch.chdir("/")
    export.main(export.parse_args(["--check", str(file)]))  # it knows where its model is
    path.rename(path.with_name("gone"))
    with pytest.raises(CheckpointError, match="which is not there; name its model with --ckpt"):
        export.main(export.parse_args(["--check", str(file)]))


def test_benchmark_says_ratios(saved, capsys):
    make(saved[0], "--benchmark", "--batch_size", "2")
    said = capsys.readouterr().out
    assert said.count("img/s, ONNX Runtime is") == 3 and "ONNX Runtime is 1.00x as fast" in said and "compiled" in said


def test_a_size_that_the_patch_does_not_divide_is_refused(saved):
    with pytest.raises(CheckpointError, match="30 30.*8"):
        make(saved[0], "--image_size", "30")


# ---- infer.py ----

@pytest.mark.parametrize("size", [(97, 61), (61, 97), (32, 48), (20, 20), (301, 64)])
def test_pictures_are_prepared_as_for_evaluation(scene, size):
    picture = scene.resize(size)
    about = dict(patch_size=8, image_size=[48, 32])
    ours = np.asarray(infer.prepare(picture, about)) / 255
    expected = center_crop_view(picture, 48, 32).permute(1, 2, 0).numpy() * (0.229, 0.224, 0.225) + (0.485, 0.456, 0.406)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    whole = infer.prepare(picture, about | {"image_size": None})
    assert whole.size == (size[0] // 8 * 8, size[1] // 8 * 8)


def test_pictures_are_turned_as_their_camera_was(scene, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken a quarter turn off
    scene.save(tmp_path / "turned.png", exif=exif)
    whole = infer.prepare(Image.open(tmp_path / "turned.png"), dict(patch_size=2, image_size=None))
    assert np.array_equal(np.asarray(whole), np.rot90(np.asarray(scene), -1)[:96, :60])


def test_odd_pictures(scene):
    about = dict(patch_size=8, image_size=None)
    deep = Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype("uint16"))
    grey = np.asarray(infer.prepare(deep, about))[:, :, 0]
    assert grey.min() == 0 and 254 <= grey.max() <= 255 and abs(grey.mean() - 127.5) < 1
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert np.asarray(infer.prepare(clear, about)).min() == 255
    assert infer.prepare(Image.new("RGB", (4000, 3000)), about).size == (584, 440)  # 4015 patches
    with pytest.raises(ValueError, match="less than a patch"):
        infer.prepare(Image.new("RGB", (7, 30)), about)


WITHOUT = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "onnx", "safetensors", "tqdm", "vit", "checkpoint"}:
            raise ImportError(name + " is not needed here")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", [["infer.py"], ["export.py", "run"]])
@pytest.mark.parametrize("flags", [
    [], ["--precision", "fp16", "--heads", "mean", "--dynamic", "none", "--batch_size", "2"],
    ["--normalize", "nhwc", "--dynamic", "size"]])
def test_a_folder_with_file_and_picture_is_enough(saved, tmp_path, scene, script, flags):
    """ONNX Runtime, numpy and Pillow: everything else refuses to be imported."""
    path, model = saved
    file = make(path, *flags)
    place = tmp_path / "place"
    place.mkdir()
    for name in {"infer.py", script[0]}:
        shutil.copy(ROOT / name, place)
    shutil.copy(file, place)
    scene.save(place / "dog.png")
    result = subprocess.run([sys.executable, "-c", WITHOUT, *script, file.name, "dog.png"], cwd=place, text=True,
                            capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "dog.png: features [64], attention [" in result.stdout
    sheet = Image.open(place / "dog.png.attention.png")
    side = (96, 56) if "size" in flags else (32, 32)
    assert sheet.size == (side[0] * (2 if "mean" in flags else 3), side[1])
    session, about = infer.open_model(str(file))
    picture = infer.prepare(Image.open(place / "dog.png"), about)
    features, attention = infer.infer(session, about, picture)
    x = center_crop_view(picture, *picture.size[::-1])
    x = x * torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1) + torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    x = (x - torch.tensor(about["mean"]).view(3, 1, 1)) / torch.tensor(about["std"]).view(3, 1, 1)
    with torch.no_grad():
        expected, maps = model.forward_with_attention(x[None])
    assert torch.cosine_similarity(torch.from_numpy(features.astype("float32")), expected[0], dim=0) > 0.9999
    maps = maps[0].unflatten(1, [side // 8 for side in picture.size[::-1]])
    np.testing.assert_allclose(attention, maps.mean(0) if "mean" in flags else maps, atol=2e-3)
    lit = np.asarray(sheet.convert("L"))[:, side[0]:2 * side[0]].astype(float)  # white where it is largest
    first = (maps.mean(0) if "mean" in flags else maps[0]).numpy()
    assert lit.max() == 255 and np.corrcoef(lit[4::8, 4::8].ravel(), first.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("argv, words", [
    ([], "takes FILE.onnx PICTURE"), (["missing.onnx", "dog.png"], "missing.onnx: not a file of export.py"),
    (["dog.png", "dog.png"], "dog.png: not a file of export.py"), (["teacher.onnx", "missing.png"], "missing.png"),
    (["teacher.onnx", "teacher.onnx"], "cannot identify image file")])
def test_what_cannot_be_used_is_one_line(saved, scene, monkeypatch, capfd, argv, words):
    monkeypatch.chdir(saved[0].parent)
    make(saved[0])
    scene.save("dog.png")
    onnxruntime.set_default_logger_severity(4)  # it writes lines of its own
    capfd.readouterr()
    assert infer.main(argv) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("infer.py: ") and words in lines[0]


def test_the_pictures_that_can_be_read_are_not_lost(saved, scene, monkeypatch, capsys):
    monkeypatch.chdir(saved[0].parent)
    make(saved[0])
    scene.save("dog.png")
    assert infer.main(["teacher.onnx", "missing.png", "dog.png"]) == 2 and Path("dog.png.attention.png").exists()
