"""Round trips through timm and transformers: their model loads our file and gives our features, and back."""

import pytest
import timm
import torch
import transformers

import export
from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from common.weights import load_backbone, read_weights, save_model
from data.loaders import center_crop_view
from vit import VisionTransformer

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2)  # heads of 24, not 64


def saved(tmp_path, **vit):
    torch.manual_seed(0)
    model = VisionTransformer(**vit).eval()
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, mean=0.5, std=0.2)
    path = tmp_path / "teacher.safetensors"
    save_model(path, {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()},
               dict(arch="vit_tiny", backbone=vit, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))
    return path, model


def exported(path, name, capsys):
    export.main(export.parse_args(["--ckpt", str(path), "--format", name]))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("written to ")
    return line.removeprefix("written to ")


@torch.no_grad()
def test_timm(tmp_path, capsys):
    path, model = saved(tmp_path, img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3)
    images = torch.randn(2, 3, 224, 224)
    file = exported(path, "timm", capsys)
    assert load_backbone(file)[0].num_heads == 3
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, checkpoint_path=file).eval()
    torch.testing.assert_close(theirs(images), model(images), rtol=0, atol=1e-5)
    torch.nn.init.normal_(theirs.norm.bias)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours, _ = load_backbone(tmp_path / "theirs.pth")
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)


@torch.no_grad()
def test_transformers(tmp_path, capsys, scene):
    path, model = saved(tmp_path, **SMALL)
    images = torch.randn(2, 3, 32, 32)
    folder = exported(path, "transformers", capsys)
    theirs, report = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True,
                                                           attn_implementation="eager")
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    output = theirs.eval()(images, output_attentions=True)
    features, attention = model.forward_with_attention(images)
    torch.testing.assert_close(output.last_hidden_state[:, 0], features, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.attentions[-1][:, :, 0, 1:], attention, rtol=0, atol=1e-5)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert list(processor.image_mean) == [0.1, 0.2, 0.3] and list(processor.image_std) == [0.4, 0.5, 0.6]
    view = processor(scene, return_tensors="pt")["pixel_values"][0]
    ours = (center_crop_view(scene, 32) * torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
            + torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1) - torch.tensor((0.1, 0.2, 0.3)).view(3, 1, 1)) \
        / torch.tensor((0.4, 0.5, 0.6)).view(3, 1, 1)
    assert (view - ours).abs().mean() < 0.05  # transformers rounds the longer side differently, a shift of one pixel
    torch.nn.init.normal_(theirs.layernorm.bias)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load_backbone(tmp_path / "theirs")  # the number of heads is in config.json
    assert ours.num_heads == 2
    before = (tmp_path / "theirs" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="theirs/config.json: is of another model, name another --output"):
        export.main(export.parse_args(["--ckpt", str(path), "--format", "transformers", "--output",
                                       f"{tmp_path}/theirs"]))
    assert (tmp_path / "theirs" / "model.safetensors").read_bytes() == before
    export.main(export.parse_args(["--ckpt", f"{tmp_path}/theirs/"]))
    assert (tmp_path / "theirs.onnx").exists()
    torch.testing.assert_close(ours(images), theirs(images).last_hidden_state[:, 0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_safetensors_and_the_released_backbone(tmp_path, capsys):
    path, model = saved(tmp_path, **SMALL)
    images = torch.randn(2, 3, 32, 32)
    file = exported(path, "safetensors", capsys)
    ours, info = load_backbone(file)
    assert torch.equal(ours(images), model(images)) and info["arch"] == "vit_tiny"
    assert all(name.startswith("backbone.") for name in read_weights(file)[0])
    released = torch.load(exported(path, "dino", capsys), weights_only=True)
    assert released.keys() == model.state_dict().keys()
    assert all(torch.equal(released[name], tensor) for name, tensor in model.state_dict().items())


def test_full_checkpoint_in_the_released_layout(tmp_path, capsys):
    _, model = saved(tmp_path, **SMALL)
    networks = {name: {f"backbone.{key}": tensor + i for key, tensor in model.state_dict().items()}
                | {"head.last_layer.weight_v": torch.ones(3, 3)} for i, name in enumerate(("student", "teacher"))}
    save_checkpoint(tmp_path / "checkpoint.pth", **networks, dino_loss={"center": torch.zeros(1, 3)},
                    info={"vit": SMALL}, progress={"step": 7}, flags={"arch": "vit_tiny", "patch_size": 8})
    full = torch.load(exported(tmp_path / "checkpoint.pth", "dino_full", capsys))  # as the released scripts do
    assert set(full) == {"student", "teacher", "dino_loss", "args"}
    assert full["args"] == {"arch": "vit_tiny", "patch_size": 8, "num_heads": 2}
    assert set(full["student"]) == {f"module.{name}" for name in networks["student"]}
    for i, name in enumerate(("student", "teacher")):
        weights = load_checkpoint(tmp_path / "checkpoint.dino_full.pth")[name]
        torch.testing.assert_close(weights["module." * (i == 0) + "backbone.norm.bias"], model.norm.bias.detach() + i)


@pytest.mark.parametrize("name", ["timm", "dino", "dino_full", "transformers", "safetensors"])
@torch.no_grad()
def test_every_format_holds_the_number_of_heads(tmp_path, capsys, name):
    """The backbone of shapes.txt has 8 heads of 16; from its width of 128 alone they would be 2 of 64."""
    path, model = saved(tmp_path, img_size=32, patch_size=8, embed_dim=128, depth=4, num_heads=8)
    if name == "dino_full":
        weights = {f"backbone.{key}": tensor for key, tensor in model.state_dict().items()}
        path = tmp_path / "checkpoint.pth"
        save_checkpoint(path, student=weights, teacher=weights, dino_loss={}, flags={"arch": "vit_tiny"}, info={
            "backbone": dict(img_size=32, patch_size=8, embed_dim=128, depth=4, num_heads=8)})
    ours, _ = load_backbone(exported(path, name, capsys))
    assert ours.num_heads == 8 and "assuming" not in capsys.readouterr().out
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), model(images), rtol=0, atol=0)


@torch.no_grad()
def test_files_with_their_number_of_heads_load_elsewhere(tmp_path, capsys):
    path, model = saved(tmp_path, img_size=32, patch_size=8, embed_dim=128, depth=4, num_heads=8)
    images = torch.randn(2, 3, 32, 32)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=128,
                               depth=4, num_heads=8, checkpoint_path=exported(path, "timm", capsys)).eval()
    torch.testing.assert_close(theirs(images), model(images), rtol=0, atol=1e-5)
    released = torch.load(exported(path, "dino", capsys), weights_only=True)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=128,
                               depth=4, num_heads=8).eval()
    theirs.load_state_dict(released, strict=True)
    torch.testing.assert_close(theirs(images), model(images), rtol=0, atol=1e-5)
