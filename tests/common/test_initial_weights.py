"""Weights of a full checkpoint of the reference: made by running it, with its own next step from there."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv

import train
from common.checkpoint import load_checkpoint
from common.initial_weights import CONTINUE, load_initial_weights, read_initial_weights, resample_embeddings
from common.weights import save_model
from dino_loss import DINOLoss
from optim import build_optimizer, build_param_groups, decay_layers
from train import Schedule, build_networks, train_step
from vit import VisionTransformer

REFERENCE = Path(__file__).parents[1] / "fixtures" / "reference_checkpoint"


def parse(*flags):
    return train.parse_args(["--init", str(REFERENCE / "checkpoint.pth"), "--global_crops_size", "32",
                             "--local_crops_size", "16", "--local_crops_number", "2", "--device", "cpu", *flags])


def test_the_next_step_is_that_of_the_reference(image, capsys):
    args = parse("--optimizer", "sgd", "--precision", "fp32", "--drop_path_rate", "0")
    student, teacher = build_networks(*train.model_arguments(args))
    dino_loss = DINOLoss(args.out_dim)
    load_initial_weights(read_initial_weights(args.init), student, teacher, dino_loss)
    assert "student and teacher, with heads, the center\n" in capsys.readouterr().out
    expected = load_file(REFERENCE / "next_step.safetensors")
    crops = [image(4, s, s, 0.3 * 3 + 1.1 * v) for v, s in enumerate((32, 32, 16, 16))]
    schedule = Schedule(lr=0.05, weight_decay=0.1, momentum=0.9, teacher_temp=0.05, freeze_last_layer=False)
    finite = torch.tensor(True)
    loss, = train_step(student, teacher, dino_loss, build_optimizer("sgd", build_param_groups(student)),
                       torch.amp.GradScaler("cpu", enabled=False), [crops], schedule, args, finite)
    found = {"loss": loss.view(1), "center": dino_loss.center}
    found |= {f"{name}.{key}": tensor for name, network in (("student", student), ("teacher", teacher))
              for key, tensor in network.state_dict().items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)


# ---- flags ----

def test_flags_follow_the_weights(exit_message, tmp_path):
    args = parse()
    assert (args.arch, args.patch_size, args.embed_dim, args.depth, args.num_heads) == ("vit_small", 8, 16, 2, 2)
    assert (args.out_dim, args.hidden_dim, args.bottleneck_dim, args.head_layers) == (32, 24, 8, 3)
    assert args.lr == CONTINUE["lr"] and args.init_head_epochs == 0 and not args.use_bn_in_head
    args = parse("--lr", "0.3", "--patch_size", "4", "--out_dim", "32")
    assert args.lr == 0.3 and args.patch_size == 4 and args.momentum_teacher == CONTINUE["momentum_teacher"]
    for flags, message in ((["--out_dim", "64"], f"--out_dim 64: --init {REFERENCE}/checkpoint.pth has 32, leave the"),
                           (["--depth", "3"], "--depth 3: --init"),
                           (["--init_head_epochs", "7", "--epochs", "7"], "--init_head_epochs 7 is not less than"),
                           (["--init", str(tmp_path / "none.pth")], "none.pth: no such file"),
                           (["--init", str(tmp_path / "wide.pth")], "wide.pth: its mlp_ratio is 2, networks here")):
        torch.save(VisionTransformer(32, 8, 3, 64, 1, 1, mlp_ratio=2).state_dict(), tmp_path / "wide.pth")
        assert message in exit_message(parse, *flags)


def test_heads_and_centers_that_do_not_fit(tmp_path, capsys, exit_message):
    """A head of another kind is left out; NaN is refused. The name of the file does not matter."""
    path, state = str(tmp_path / "checkpoint.pth.1"), load_checkpoint(REFERENCE / "checkpoint.pth")
    torch.save(state, path)
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    whole = read_initial_weights(path)
    assert whole.head["out_dim"] == 32 and torch.equal(whole.center, state["dino_loss"]["center"])
    for loss in ({"center": torch.zeros(1, 3)}, {"center": "x"}, [1], None):
        torch.save(state | {"dino_loss": loss}, path)
        weights = read_initial_weights(path)
        assert weights.center is None and weights.head == whole.head
    for missing in ("last_layer", "weight_g", "mlp.2.weight", "mlp"):
        networks = {key: {name: tensor for name, tensor in state[key].items()
                          if not ("head." in name and missing in name)} for key in ("student", "teacher")}
        torch.save(state | networks, path)
        capsys.readouterr()
        assert read_initial_weights(path).head is None
        assert "student and teacher, without heads, which start at random, no center" in capsys.readouterr().out
    state["teacher"]["head.mlp.0.bias"][0] = float("nan")
    torch.save(state, path)
    assert "['mlp.0.bias'] holds NaN or infinity" in exit_message(read_initial_weights, path)


# ---- runs ----

@pytest.fixture
def backbone(tmp_path):
    """The teacher's backbone alone, in a file with the names of the released ones."""
    backbone = read_initial_weights(str(REFERENCE / "checkpoint.pth"), lambda text: None).teacher["backbone"]
    torch.save(backbone, tmp_path / "backbone.pth")
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    return backbone


def test_a_backbone_alone_waits_for_its_head(small_shapes, backbone, tmp_path, capsys):
    """For --init_head_epochs it stays to the bit; resuming needs neither --init nor its file."""
    flags = ("--data_path shapes:32 --out_dim 16 --hidden_dim 16 --bottleneck_dim 8 --num_workers 0 --epochs 2 "
             "--lr 0.1 --global_crops_size 32 --local_crops_size 16 --local_crops_number 1 --batch_size_per_gpu 8 "
             f"--knn_every 1 --device cpu --saveckp_freq 1 --output_dir {tmp_path}/run").split()
    train.main(train.parse_args([*flags, "--init", f"{tmp_path}/backbone.pth", "--init_head_epochs", "1"]))
    out = capsys.readouterr().out
    assert "one network, for student and teacher, without heads, which start at random, no center" in out
    assert "k-NN of initial backbone" in out and "continuing from" in out and "layer_decay 0.8" in out
    first, last = (load_checkpoint(tmp_path / "run" / name) for name in ("checkpoint0000.pth", "checkpoint.pth"))
    for name, tensor in backbone.items():
        assert all(torch.equal(first[network][f"backbone.{name}"], tensor) for network in ("student", "teacher"))
        assert not torch.equal(last["student"][f"backbone.{name}"], tensor) or tensor.numel() < 3, name
    assert not torch.equal(first["student"]["head.mlp.0.weight"], last["student"]["head.mlp.0.weight"])
    (tmp_path / "backbone.pth").unlink()
    train.main(train.parse_args([*flags, "--epochs", "3"]))
    assert "resuming at step 74 of 111" in capsys.readouterr().out


def test_a_head_is_trained_first_for_an_eighth_of_the_run(backbone, tmp_path):
    for epochs, expected in (("1", 0), ("2", 1), ("8", 1), ("20", 3), ("100", 5)):
        args = train.parse_args(["--init", f"{tmp_path}/backbone.pth", "--device", "cpu", "--epochs", epochs,
                                 "--global_crops_size", "32", "--local_crops_size", "16"])
        assert args.init_head_epochs == expected and args.layer_decay == 0.8


def test_a_run_continues_from_another(small_shapes, tmp_path, capsys):
    """From the folder of a run: student, teacher, heads and center are those of its checkpoint."""
    flags = ("--arch vit_tiny --patch_size 8 --embed_dim 16 --depth 1 --num_heads 2 --out_dim 16 --hidden_dim 16 "
             "--bottleneck_dim 8 --data_path shapes:32 --global_crops_size 32 --local_crops_size 16 --device cpu "
             "--local_crops_number 1 --batch_size_per_gpu 64 --num_workers 0 --knn_every 0 --epochs 1").split()
    train.main(train.parse_args([*flags, "--teacher_temp", "0.05", "--centering", "batch", "--use_bn_in_head", "false",
                                 "--output_dir", f"{tmp_path}/one"]))
    state = load_checkpoint(tmp_path / "one" / "checkpoint.pth")
    weights = read_initial_weights(f"{tmp_path}/one")
    args = train.parse_args(["--init", f"{tmp_path}/one", *flags[flags.index("--data_path"):]])
    assert args.arch == "vit_small" and args.depth == 1 and args.out_dim == 16
    assert args.teacher_temp == args.warmup_teacher_temp == 0.05 and args.centering == "batch"
    student, teacher = build_networks(*train.model_arguments(args))
    load_initial_weights(weights, student, teacher, dino_loss := DINOLoss(16))
    for name, network in (("student", student), ("teacher", teacher)):
        assert all(torch.equal(tensor, state[name][key]) for key, tensor in network.state_dict().items())
    assert torch.equal(dino_loss.center, state["dino_loss"]["center"]) and dino_loss.center.any()
    one = read_initial_weights(f"{tmp_path}/one/student.safetensors")
    assert one.center is None and one.student is one.teacher and one.head == weights.head
    assert torch.equal(one.teacher["head"]["last_layer.weight_v"], state["student"]["head.last_layer.weight_v"])
    assert "one network, for student and teacher, with heads, no center, which starts at 0" in capsys.readouterr().out
    # from its own folder, whose files the new run replaces
    flags = [*flags[flags.index("--data_path"):], "--init", f"{tmp_path}/one", "--output_dir", f"{tmp_path}/one"]
    again = train.parse_args([*flags, "--resume", "none", "--overwrite", "--lr", "1e-30", "--min_lr", "0"])
    train.main(again)
    for name, tensor in load_checkpoint(tmp_path / "one" / "checkpoint.pth")["student"].items():
        torch.testing.assert_close(tensor, state["student"][name], rtol=0, atol=1e-6)


# ---- other sizes and learning rates ----

@pytest.mark.parametrize("patch_size, size", [(4, 32), (16, 64), (8, 64)])
def test_embeddings_are_resampled_as_by_timm(backbone, patch_size, size, capsys):
    model = VisionTransformer(size, patch_size, embed_dim=16, depth=2, num_heads=2)
    found = resample_embeddings(backbone, model, print)
    expected = resample_patch_embed(backbone["patch_embed.proj.weight"], [patch_size, patch_size])
    torch.testing.assert_close(found["patch_embed.proj.weight"], expected, rtol=0, atol=1e-5)
    expected = resample_abs_pos_embed(backbone["pos_embed"], list(model.grid), num_prefix_tokens=1)
    torch.testing.assert_close(found["pos_embed"], expected, rtol=0, atol=1e-6)
    model.load_state_dict(found)
    out = capsys.readouterr().out
    assert (f"patch embedding resampled from 8 to {patch_size} pixels" in out) == (patch_size != 8)
    assert (f"from 4 x 4 to {size // patch_size} x {size // patch_size} patches" in out) == (size != 4 * patch_size)


@pytest.mark.parametrize("before, after, how", [
    (3, 1, "summed"), (3, 5, "repeated"), (3, 2, "summed"), (5, 3, "summed"), (5, 1, "summed"), (1, 4, "repeated")])
def test_patch_embeddings_of_other_channels(before, after, how, capsys):
    """As timm's where it has a rule; the embedding of equal channels stays, where none is repeated more than another.
    """
    arguments = dict(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    models = [VisionTransformer(in_chans=channels, **arguments) for channels in (before, after)]
    found = resample_embeddings(models[0].state_dict(), models[1], print)
    assert f"patch embedding of {before} channels {how} to {after}\n" in capsys.readouterr().out
    kernel = found["patch_embed.proj.weight"]
    if before == 3 and after != 2:
        expected = adapt_input_conv(after, models[0].state_dict()["patch_embed.proj.weight"])
        torch.testing.assert_close(kernel, expected, rtol=1e-6, atol=1e-7)
    models[1].load_state_dict(found)
    if after < before or after % before == 0:
        x = torch.randn(2, 1, 32, 32)
        a, b = (model.patch_embed.proj(x.expand(-1, model.in_chans, -1, -1)) for model in models)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert a.std() > 0.02 and len(kernel.unique()) >= 16 * min(before, after) * 64


def test_weights_with_a_convolutional_stem(small_shapes, tmp_path, exit_message, capsys):
    """They bring the flag, which a resumed run keeps; another patch size is refused, other channels are converted."""
    sizes = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    for stem in (True, False):
        model = VisionTransformer(**sizes, conv_stem=stem)
        save_model(tmp_path / f"{stem}.safetensors", model.state_dict(), dict(backbone=sizes | dict(conv_stem=stem)))
    flags = ["--init", str(tmp_path / "True.safetensors"), "--output_dir", str(tmp_path / "run"), "--num_workers", "0",
             "--out_dim", "8", "--hidden_dim", "8", "--knn_every", "0"]
    train.main(parse(*flags, "--epochs", "1"))
    assert parse(*flags).conv_stem  # of the run, which would be resumed; before, of the weights
    for flags, message in (("True.safetensors --patch_size 4", "--patch_size 4: --init"),
                           ("True.safetensors --conv_stem false", "--conv_stem False: --init"),
                           ("False.safetensors --conv_stem", "--conv_stem True: --init")):
        name, *flags = flags.split()
        assert message in exit_message(parse, "--init", str(tmp_path / name), *flags)
    before = read_initial_weights(str(tmp_path / "True.safetensors")).student["backbone"]
    model = VisionTransformer(**sizes | dict(img_size=64), in_chans=1, conv_stem=True)
    model.load_state_dict(resample_embeddings(before, model, print))
    kernel = model.patch_embed.stem[0].conv.weight
    torch.testing.assert_close(kernel, adapt_input_conv(1, before["patch_embed.stem.0.conv.weight"]))
    assert "patch embedding of 3 channels summed to 1\n" in capsys.readouterr().out


def test_learning_rates_decay_by_layer():
    student, _ = build_networks(dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2), dict(
        out_dim=16, hidden_dim=16, bottleneck_dim=8))
    before = {name: p.clone() for name, p in student.named_parameters()}
    optimizer = build_optimizer("sgd", build_param_groups(student, decay_layers(student.backbone, 0.5)))
    for p in student.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    for group in optimizer.param_groups:
        group["lr"] = 1.0 * group["lr_scale"]
    optimizer.step()
    moved = {name: (before[name] - p).mean().item() for name, p in student.named_parameters()}
    for name, factor in (("head.mlp.0.weight", 1), ("backbone.norm.bias", 0.5), ("backbone.cls_token", 0.125),
                         ("backbone.blocks.1.mlp.fc1.weight", 0.5), ("backbone.blocks.0.attn.qkv.bias", 0.25),
                         ("backbone.patch_embed.proj.weight", 0.125)):
        assert moved[name] == pytest.approx(factor, rel=1e-5), name
