import json

import onnx
import onnxruntime
import pytest
import torch

import export
from checkpoint import CheckpointError, save_model
from vit import VisionTransformer


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    vit = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)
    model = VisionTransformer(**vit).eval()
    for p in model.parameters():  # far from the initial values, so that every path shows in the output
        torch.nn.init.normal_(p, std=0.15) if p.ndim > 1 else torch.nn.init.normal_(p, mean=0.5, std=0.2)
    path = tmp_path / "teacher.safetensors"
    save_model(path, {f"backbone.{k}": v for k, v in model.state_dict().items()},
               dict(arch="vit_tiny", vit=vit, mean=(0.1, 0.2, 0.3)))
    return path, model


@pytest.mark.parametrize("flags, height, width", [
    ("", 32, 32), ("--image_size 48", 48, 48), ("--image_size 40 64", 40, 64)])
def test_onnx_equals_torch(saved, flags, height, width, capsys):
    path, model = saved
    export.main(export.parse_args(["--ckpt", str(path), *flags.split()]))
    assert "largest difference from torch" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(path.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["image"]
    assert session.get_inputs()[0].shape[1:] == [3, height, width] and isinstance(session.get_inputs()[0].shape[0], str)
    assert [o.name for o in session.get_outputs()] == ["features", "attention"]
    for batch in (1, 5):
        x = torch.randn(batch, 3, height, width)
        features, attention = map(torch.from_numpy, session.run(None, {"image": x.numpy()}))
        with torch.no_grad():
            torch.testing.assert_close(features, model(x), rtol=0, atol=1e-4)
            expected = model.get_last_selfattention(x)[:, :, 0, 1:].reshape(batch, 2, height // 8, width // 8)
        torch.testing.assert_close(attention, expected, rtol=0, atol=1e-5)
    metadata = {p.key: p.value for p in onnx.load(path.with_suffix(".onnx")).metadata_props}
    assert metadata["arch"] == "vit_tiny" and json.loads(metadata["image_size"]) == [height, width]
    assert json.loads(metadata["mean"]) == [0.1, 0.2, 0.3] and len(json.loads(metadata["std"])) == 3


def test_a_file_that_differs_is_refused(saved, monkeypatch):
    path, _ = saved
    whole = export.export_onnx

    def slightly_off(backbone, *args):
        other = VisionTransformer(32, 8, embed_dim=64, depth=2, num_heads=2).eval()
        other.load_state_dict(backbone.state_dict())
        with torch.no_grad():
            other.norm.bias[0] += 1e-3
        whole(other, *args)

    monkeypatch.setattr(export, "export_onnx", slightly_off)
    with pytest.raises(export.ExportError, match="features differs from torch by 0.001"):
        export.main(export.parse_args(["--ckpt", str(path)]))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_size_that_the_patch_does_not_divide_is_refused(saved):
    with pytest.raises(CheckpointError, match="30 30.*8"):
        export.main(export.parse_args(["--ckpt", str(saved[0]), "--image_size", "30"]))
