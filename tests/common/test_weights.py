import argparse
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import load_file, save_file

from common.checkpoint import load_checkpoint, save_checkpoint
from common.paths import find_model, find_newest_model
from common.weights import CheckpointError, load_backbone, read_weights, save_model
from vit import VisionTransformer

FIXTURE = Path(__file__).parents[1] / "fixtures" / "before_redesign"
SMALL = dict(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VisionTransformer(**SMALL).eval()


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_model_round_trip_keeps_weights_and_description(tmp_path, model):
    weights = {f"backbone.{name}": value for name, value in model.state_dict().items()} | {"head.x": torch.ones(2)}
    info = dict(arch="vit_tiny", backbone=SMALL | {"num_heads": 4}, mean=(0.5, 0.5, 0.5), data_path="shapes")
    save_model(tmp_path / "m.safetensors", weights, info)
    (tmp_path / "readable").touch()
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "readable").stat().st_mode
    loaded, read = load_backbone(tmp_path / "m.safetensors")
    assert equal(loaded, model) and loaded.num_heads == 4 and not loaded.training
    backbone = info["backbone"] | {"in_chans": 3, "mlp_ratio": 4.0}
    assert read == info | {"backbone": backbone, "mean": [0.5, 0.5, 0.5], "network": None}


@pytest.mark.parametrize("wrap", [lambda weights: {"teacher": {f"backbone.{k}": v for k, v in weights.items()}},
                                  lambda weights: {f"module.{k}": v for k, v in weights.items()}])
def test_convolutional_stem_is_found_by_its_shapes(tmp_path, wrap):
    torch.manual_seed(0)
    model = VisionTransformer(**SMALL, in_chans=5, conv_stem=True)
    model(torch.randn(4, 5, 32, 32))  # other statistics than those of a new one
    torch.save(wrap(model.state_dict()), tmp_path / "w.pth")
    loaded, info = load_backbone(tmp_path / "w.pth")
    assert equal(loaded, model) and info["backbone"] == SMALL | dict(in_chans=5, mlp_ratio=4.0, conv_stem=True)


def test_files_with_the_metadata_key_vit(tmp_path, model):
    save_model(tmp_path / "old.safetensors", model.state_dict(), {"vit": SMALL | {"num_heads": 4}, "arch": "vit_tiny"})
    loaded, info = load_backbone(tmp_path / "old.safetensors")
    assert equal(loaded, model) and loaded.num_heads == 4 and info["arch"] == "vit_tiny" and "vit" not in info


def test_files_from_before_the_redesign(capsys):
    backbone, info = load_backbone(FIXTURE / "teacher.safetensors", key="teacher")
    weights = load_file(FIXTURE / "teacher.safetensors")
    state = backbone.state_dict()
    assert all(torch.equal(tensor, weights[f"backbone.{name}"]) for name, tensor in state.items())
    assert f"all {len(state)} backbone tensors matched\n" in capsys.readouterr().out  # the head is no surprise
    assert (info["arch"], info["data_path"], info["network"]) == ("vit_tiny", "shapes:32", "teacher")
    assert (backbone.num_heads, backbone.patch_size, backbone.grid) == (2, 8, (4, 4)) and info["head"]["out_dim"] == 32
    from_checkpoint, _ = load_backbone(FIXTURE / "checkpoint.pth", key="teacher", log=lambda text: None)
    assert equal(from_checkpoint, backbone)
    classifier, info, network = read_weights(str(FIXTURE / "linear" / "classifier.safetensors"))
    assert {name: list(tensor.shape) for name, tensor in classifier.items()} == {
        "classifier.weight": [8, 32], "classifier.bias": [8]}
    assert network == "teacher" and info["n_last_blocks"] == 2 and len(info["classes"]) == 8
    with pytest.raises(CheckpointError, match="none of its 2 tensors"):
        load_backbone(FIXTURE / "linear" / "classifier.safetensors")


def test_shapes_decide_over_the_description(tmp_path, model):
    wrong = SMALL | {"depth": 10**9, "embed_dim": 10**6, "patch_size": 4}
    save_model(tmp_path / "wrong.safetensors", model.state_dict(), {"backbone": wrong})
    loaded, info = load_backbone(tmp_path / "wrong.safetensors")
    assert equal(loaded, model) and info["backbone"]["depth"] == 2
    save_model(tmp_path / "wrong.safetensors", model.state_dict(), {"backbone": SMALL | {"num_heads": -1}})
    with pytest.raises(CheckpointError, match="num_heads is -1"):
        load_backbone(tmp_path / "wrong.safetensors")


def test_reference_files(tmp_path, model, capsys):
    plain = model.state_dict()
    torch.save(plain, tmp_path / "backbone_only.pth")
    other = VisionTransformer(**SMALL).state_dict()
    full = {"student": {f"module.backbone.{k}": v for k, v in other.items()},
            "teacher": {f"backbone.{k}": v for k, v in plain.items()} | {"head.mlp.0.bias": torch.zeros(3)},
            "epoch": 100, "args": argparse.Namespace(arch="vit_small"),
            "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.001)}]}, "fp16_scaler": None}
    torch.save(full, tmp_path / "full.pth")
    with zipfile.ZipFile(tmp_path / "full.pth") as archive, zipfile.ZipFile(tmp_path / "older.pth", "w") as older:
        for name in archive.namelist():  # as NumPy 1 wrote it
            older.writestr(name, archive.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    for name in ("backbone_only.pth", "full.pth", "older.pth"):
        assert equal(load_backbone(tmp_path / name)[0], model)
        output = capsys.readouterr().out
        assert "all 30 backbone tensors matched" in output and "does not hold the number of heads" in output
    student, _ = load_backbone(tmp_path / "full.pth", key="student")
    assert torch.equal(student.pos_embed, other["pos_embed"])


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.backbone.", "module.base_encoder.", "deit."])
def test_common_prefixes(tmp_path, model, prefix):
    weights = {prefix + name: value for name, value in model.state_dict().items()} | {"fc.weight": torch.ones(2)}
    save_file(weights, tmp_path / "p.safetensors", metadata={"author": "someone"})
    assert equal(load_backbone(tmp_path / "p.safetensors")[0], model)


@pytest.mark.parametrize("student, teacher", [
    ("student_backbone.", "teacher_backbone."), ("backbone.", "momentum_backbone."),
    ("module.base_encoder.", "module.momentum_encoder."), ("online_network.", "target_network."),
    ("module.encoder_q.", "module.encoder_k."), ("model.", "ema.")])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_two_networks_under_one_level(tmp_path, model, capsys, student, teacher, suffix):
    """lightly, solo-learn, MoCo v3, BYOL, MoCo, and averages."""
    other, path = VisionTransformer(**SMALL), tmp_path / f"last.{suffix}"
    weights = {student + name: tensor for name, tensor in other.state_dict().items()}
    weights |= {teacher + name: tensor for name, tensor in model.state_dict().items()} | {"fc.bias": torch.ones(2)}
    save_file(weights, path) if suffix == "safetensors" else torch.save({"epoch": 3, "state_dict": weights}, path)
    for key, expected, name in ((None, model, teacher), ("teacher", model, teacher), ("student", other, student)):
        loaded, info = load_backbone(path, key)
        assert equal(loaded, expected) and info["network"] == (key or "teacher")
        output = capsys.readouterr().out
        taken, networks = re.search("took (.*) of the networks (.*)", output).groups()
        assert taken == name[:-1] and {*networks.split(", ")} == {student[:-1], teacher[:-1]}
        assert "all 30 backbone tensors matched, 1 other left out (fc.bias)" in output


def test_two_networks_under_two_levels(tmp_path, model, capsys):
    other, path = VisionTransformer(**SMALL), tmp_path / "last.pth"
    for plain, averaged in (("state_dict", "state_dict_ema"), ("model", "model_ema"), ("student", "teacher")):
        torch.save({plain: other.state_dict(), averaged: model.state_dict(), "epoch": 3}, path)
        for key, expected, name in ((None, model, averaged), ("teacher", model, averaged), ("student", other, plain)):
            assert equal(load_backbone(path, key)[0], expected)
            assert f"took {name} of the networks " in capsys.readouterr().out
    torch.save({"state_dict": model.state_dict()}, path)
    with pytest.raises(CheckpointError, match="holds no network named teacher"):
        load_backbone(path, "teacher")


def test_names_of_wrappers_and_levels(tmp_path, model):
    """torch.compile, FSDP, activation checkpointing, DINOv2's block chunks; DeepSpeed, Lightning, nested levels."""
    plain, path = model.state_dict(), tmp_path / "w.pth"
    block = {name: name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod.")
             .replace("patch_embed.", "patch_embed._orig_mod.") for name in plain}
    chunk = {name: name.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0.") for name in plain}
    assert [sum(new != name for name, new in names.items()) for names in (block, chunk)] == [14, 24]
    for names in (block, chunk):
        torch.save({f"backbone.{names[name]}": tensor for name, tensor in plain.items()}, path)
        assert equal(load_backbone(path)[0], model)
    for state in ({"module": plain, "ds_version": "0.17"}, {"state_dict": {f"model.{k}": v for k, v in plain.items()}},
                  {"state_dict": {"module": {f"module.model.{k}": v for k, v in plain.items()}}}):
        torch.save(state, path)
        assert equal(load_backbone(path)[0], model)


@torch.no_grad()
def test_config_beside_any_file_gives_the_heads(tmp_path, capsys):
    config = transformers.ViTConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
                                    image_size=32, patch_size=8, layer_norm_eps=1e-6)
    theirs, x = transformers.ViTModel(config).eval(), torch.randn(2, 3, 32, 32)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    ours, _ = load_backbone(tmp_path / "pytorch_model.bin")
    assert ours.num_heads == 4 and "assuming" not in capsys.readouterr().out
    expected = theirs(x).last_hidden_state
    torch.testing.assert_close(ours.get_intermediate_layers(x)[0], expected, rtol=0, atol=1e-5)
    for text in ("", "[1]", json.dumps({"hidden_size": 768, "num_attention_heads": 12, "hidden_act": "relu"})):
        (tmp_path / "config.json").write_text(text)  # of another program or model
        assert load_backbone(tmp_path / "pytorch_model.bin")[0].num_heads == 2
        assert "assuming 2 of 64 channels" in capsys.readouterr().out
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=128, depth=2,
                               num_heads=8).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    for text in ('{"architecture": "vit", "model_args": {"num_heads": 8}}', '{"num_heads": 8}'):
        (tmp_path / "config.json").write_text(text)
        torch.testing.assert_close(load_backbone(tmp_path / "timm.pth")[0](x), theirs(x), rtol=0, atol=1e-5)


def test_flags_of_reference_checkpoints_give_the_heads(tmp_path, model):
    for args in (argparse.Namespace(arch="vit_tiny", num_heads=8), {"num_heads": 8}):
        torch.save({"teacher": model.state_dict(), "args": args}, tmp_path / "full.pth")
        assert load_backbone(tmp_path / "full.pth")[0].num_heads == 8
    for args in (argparse.Namespace(arch="vit_tiny"), None, "--arch vit_tiny"):
        torch.save({"teacher": model.state_dict(), "args": args}, tmp_path / "full.pth")
        assert load_backbone(tmp_path / "full.pth")[0].num_heads == 2


@pytest.mark.parametrize("config, words", [
    ({"hidden_act": "relu"}, "hidden_act relu"), ({"hidden_act": "quick_gelu"}, "hidden_act quick_gelu"),
    ({"use_mean_pooling": True}, "use_mean_pooling True"), ({"global_pool": "avg"}, "global_pool avg"),
    ({"model_args": {"act_layer": "quick_gelu"}}, "act_layer quick_gelu")])
def test_other_activations_and_pooling_are_refused(tmp_path, model, config, words):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"config.json has {words}, vit.py computes [^\n]*$"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_act": "gelu", "global_pool": "token", "act_layer": null}')
    assert equal(load_backbone(tmp_path)[0], model)
    resnet = torchvision.models.resnet18()  # features are averages over the image
    save_file(resnet.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"global_pool": "avg"}')
    assert torch.equal(load_backbone(tmp_path)[0].model.conv1.weight, resnet.conv1.weight)


def test_timm_names(tmp_path):
    """A folder from the Hugging Face hub, whose config.json gives no number of heads."""
    theirs = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    ours, _ = load_backbone(tmp_path)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_xcit(tmp_path, capsys):
    """The released DINO files of XCiT have names that timm does not: pos_embeder, q, k and v of class attention in one.
    """
    theirs, x = timm.create_model("xcit_nano_12_p16_224", num_classes=0).eval(), torch.randn(2, 3, 64, 64)
    weights = theirs.state_dict()
    released = {name.replace("pos_embed.", "pos_embeder."): tensor for name, tensor in weights.items()}
    for name in [name for name in released if ".attn.q." in name]:
        parts = [released.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        released[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    assert len(released) == len(weights) - 8  # weights and biases of two blocks
    for state in (weights, {f"module.backbone.{name}": tensor for name, tensor in released.items()}):
        torch.save(state | {"head.bias": torch.ones(2)}, tmp_path / "xcit.pth")
        ours, info = load_backbone(tmp_path / "xcit.pth")
        assert info["backbone"] == {"arch": "timm:xcit_nano_12_p16_224"} and torch.equal(ours(x), theirs(x))
        assert "matched, 1 other left out (head.bias)" in capsys.readouterr().out


@pytest.mark.parametrize("wrap", [transformers.ViTModel, transformers.ViTForImageClassification])
def test_transformers_names(tmp_path, wrap):
    config = transformers.ViTConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
                                    image_size=32, patch_size=8, layer_norm_eps=1e-6)
    theirs = wrap(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, _ = load_backbone(tmp_path / "model.safetensors")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = getattr(theirs, "vit", theirs)(x).last_hidden_state
        torch.testing.assert_close(ours.get_intermediate_layers(x)[0], expected, rtol=0, atol=1e-5)


def test_checkpoint_survives_a_failed_write(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, step=3, weights={"a": torch.arange(3.0)}, knn={"epoch 0": (1.0, 2.0)})
    state = load_checkpoint(path)
    assert state["step"] == 3 and state["knn"] == {"epoch 0": (1.0, 2.0)}
    assert torch.equal(state["weights"]["a"], torch.arange(3.0))

    def die(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, step=4)
    assert load_checkpoint(path)["step"] == 3


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("name, content, words", [
    ("text.pth", b"no weights here", "not a checkpoint"),
    ("text.safetensors", b"no weights here", "not a safetensors file"),
    ("empty.pth", b"", "not a checkpoint"),
    ("empty.safetensors", b"", "not a safetensors file"),
    ("pickle.pth", pickle.dumps({"teacher": Evil()}), "not a checkpoint"),
])
def test_other_files_are_refused(tmp_path, monkeypatch, name, content, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: {words}"):
        load_backbone(tmp_path / name)
    assert not (tmp_path / "evil").exists()


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"teacher": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_backbone(tmp_path / "evil.pth")
    assert not (tmp_path / "evil").exists()


def test_corrupt_and_wrong_files_are_refused(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    for suffix in ("pth", "safetensors"):
        content = (tmp_path / f"whole.{suffix}").read_bytes()
        for share in (0.1, 0.5, 0.99):
            (tmp_path / f"cut.{suffix}").write_bytes(content[:int(len(content) * share)])
            with pytest.raises(CheckpointError, match="not a checkpoint|not a safetensors file"):
                load_backbone(tmp_path / f"cut.{suffix}")
    for wrong, words in (({"fc.weight": torch.ones(3, 3)}, "none of its 1 tensors"), ([1, 2], "holds a list, not"),
                         ({k: v for k, v in model.state_dict().items() if "1.mlp" not in k}, "fc1.weight is missing"),
                         (model.state_dict() | {"patch_embed.proj.weight": torch.ones(3)}, "not the weights"),
                         (model.state_dict() | {"pos_embed": torch.ones(1, 18, 128)}, r"pos_embed is \[1, 18, 128\]"),
                         (model.state_dict() | {"blocks.0.ls1.gamma": torch.ones(128)}, "ls1.gamma has no place")):
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(CheckpointError, match=words):
            load_backbone(tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        load_backbone(tmp_path / "missing.pth")


def test_find_newest_model(tmp_path):
    with pytest.raises(CheckpointError, match="no trained model"):
        find_newest_model(tmp_path)
    for age, name in ((30, "old"), (10, "new"), (20, "middle"), (0, ".dry_run-left_behind")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "teacher.safetensors").touch()
        os.utime(tmp_path / name / "teacher.safetensors", (1e9 - age, 1e9 - age))
    assert find_newest_model(tmp_path) == str(tmp_path / "new" / "teacher.safetensors")


def test_the_folder_of_a_run_is_its_teacher(tmp_path, model):
    run, other = tmp_path / "run", tmp_path / "transformers"
    for folder, name in ((run, "teacher"), (other, "model")):
        folder.mkdir()
        save_model(folder / f"{name}.safetensors", model.state_dict(), {"backbone": SMALL})
    for given in (run, run / "teacher.safetensors", f"{run}/"):
        assert find_model(str(given)) == str(run / "teacher.safetensors")
    assert equal(load_backbone(run)[0], model) and equal(load_backbone(other)[0], model)
    assert find_model(f"{other}/") == str(other)  # whose outputs are named after the folder
    with pytest.raises(CheckpointError, match="no teacher.safetensors or model.safetensors"):
        load_backbone(tmp_path)
