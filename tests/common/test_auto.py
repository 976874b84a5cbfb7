import re
from types import SimpleNamespace

import pytest

import train
from common.auto import PAPER, choose_out_dim, choose_patch_size, describe_auto, fit_to_images, fit_to_steps


def fit(num_images, side, total_steps, *flags):
    args = train.parse_args(["--device", "cpu", "--output_dir", "/nonexistent", *flags])
    fit_to_images(args, num_images, side)
    fit_to_steps(args, total_steps)
    return args


@pytest.mark.parametrize("side", [224, 256, 400.5, None])
@pytest.mark.parametrize("num_images, total_steps", [(10**6, 125_000), (1_281_167, 125_100), (10**8, 10**7)])
def test_a_million_images_get_the_flags_of_the_paper(num_images, side, total_steps):
    args = fit(num_images, side, total_steps)
    assert {name: getattr(args, name) for name in PAPER} == PAPER
    reference = train.parse_args(["--device", "cpu", "--output_dir", "/nonexistent"])
    assert vars(args) == vars(reference)


def test_small_sets():
    args = fit(50_000, 32, 10_000)
    assert (args.patch_size, args.global_crops_size, args.local_crops_size, args.out_dim) == (4, 32, 12, 4096)
    assert args.global_crops_scale == (0.8, 1.0) and args.momentum_teacher == 0.975
    assert (args.local_crops_number, args.use_bn_in_head, args.centering) == (4, True, "sinkhorn")
    args = fit(9469, 128, 5310)
    assert (args.patch_size, args.global_crops_size, args.local_crops_size, args.out_dim) == (16, 128, 48, 1024)
    assert args.global_crops_scale == (0.4, 1.0) and args.momentum_teacher == 0.9529
    args = fit(9469, 128, 5310, "--patch_size", "8", "--out_dim", "77", "--momentum_teacher", "0.9")
    assert (args.patch_size, args.global_crops_size, args.out_dim, args.momentum_teacher) == (8, 128, 77, 0.9)
    assert describe_auto(args, 9469, 128, 5310) == (
        "auto: global_crops_size 128, local_crops_size 56, local_crops_number 4, global_crops_scale 0.4 1, "
        "local_crops_scale 0.05 0.4, blur 1 0.1 0.5, use_bn_in_head true, centering sinkhorn, lr 0.0005, "
        "schedule_epochs 0, freeze_last_layer 1 (9,469 images of 128 pixels, 100 epochs)")
    args = fit(300, 20, 50, "--arch", "resnet18")
    assert args.patch_size is None and args.global_crops_size == 20 and args.out_dim == 256
    args = fit(300, 20, 50, "--loss", "mse", "--use_bn_in_head", "false")  # whose only centering is the mean
    assert args.centering == "mean" and not args.use_bn_in_head


def test_help_says_which_flags_follow_from_the_data(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    flags = re.findall(r"\n  --(\w+)(.*?)(?=\n  --|\n\n)", capsys.readouterr().out, re.DOTALL)
    assert {name for name, text in flags if "(default: from the data)" in " ".join(text.split())} == {*PAPER}
    assert all(text.count("default") == 1 for name, text in flags if name in PAPER)


def test_short_runs():
    args = fit(50_000, 32, 2343, "--epochs", "3")
    recipe = train.parse_args("@recipes/cifar10.txt --global_crops_scale 0.8 1 --local_crops_scale 0.3 0.8 "
                              "--device cpu --output_dir /nonexistent".split())
    assert {name: getattr(args, name) for name in PAPER} == {name: getattr(recipe, name) for name in PAPER} | {
        "schedule_epochs": 6}
    assert fit(3000, 32, 900, "--epochs", "19").out_dim == 256
    args = fit(3000, 64, 828, "--epochs", "18")
    assert (args.patch_size, args.global_crops_size, args.local_crops_size) == (8, 32, 16)
    for flags in ("--local_crops_size 40", "--global_crops_size 64", "--patch_size 8", "--epochs 99"):
        args = fit(3000, 64, 828, "--epochs", "18", *flags.split())
        assert (args.patch_size, args.global_crops_size) == (8, 64)
    args = fit(9469, 128, 5310, "--epochs", "18")
    assert args.patch_size == 16
    assert (args.global_crops_scale, args.local_crops_scale) == ((0.8, 1.0), (0.3, 0.8))
    assert (args.lr, args.schedule_epochs, args.local_crops_number, args.freeze_last_layer) == (0.002, 36, 4, 1)
    assert args.blur[0] == 1 and fit(9469, 128, 5310, "--epochs", "22").schedule_epochs == 0


@pytest.mark.parametrize("size", [1, 7, 8, 9, 31, 32, 63, 64, 100, 127, 128, 224])
def test_crops_are_whole_patches(size):
    args = SimpleNamespace(auto=tuple(PAPER), loss="ce", epochs=1000, **PAPER)
    fit_to_images(args, 1000, size)
    p = args.patch_size
    assert args.global_crops_size % p == args.local_crops_size % p == 0 and p == choose_patch_size(size)
    assert 0 < args.local_crops_size <= args.global_crops_size <= size and (size < 8 or size // p >= 8)


def test_crop_sizes_that_are_given_decide_the_patch_size():
    for given, size, expected in ((96, 224, 16), (40, 224, 8), (98, 224, 16), (13, 32, 4), (18, 32, 2)):
        assert choose_patch_size(size, [given]) == expected  # 98 and 13 are then refused


def test_prototypes_are_fewer_than_images():
    counts = [choose_out_dim(n) for n in (1, 1000, 3000, 5000, 10_000, 10**5, 10**6, 10**9)]
    assert counts == [256, 256, 256, 512, 1024, 8192, 65536, 65536]


def test_a_resumed_run_keeps_what_was_found(small_shapes, tmp_path, capsys):
    flags = ("--arch vit_tiny --embed_dim 16 --depth 1 --num_heads 2 --hidden_dim 16 --bottleneck_dim 8 --device cpu "
             "--local_crops_number 1 --batch_size_per_gpu 64 --num_workers 0 --knn_every 0 --data_path shapes:32 "
             f"--output_dir {tmp_path}/run").split()
    train.main(train.parse_args([*flags, "--epochs", "1"]))
    line = "auto: patch_size 8, global_crops_size 32, local_crops_size 16, global_crops_scale 0.8 1, " \
        "local_crops_scale 0.3 0.8, blur 0 0 0, out_dim 256, use_bn_in_head true, centering sinkhorn, lr 0.004, " \
        "schedule_epochs 2, freeze_last_layer 0 (300 images of 32 pixels, 1 epochs); momentum_teacher 0.9 (4 steps)\n"
    assert line in capsys.readouterr().out
    (tmp_path / "run" / "flags.txt").write_text((tmp_path / "run" / "flags.txt").read_text().replace(
        "--momentum_teacher 0.9\n", "--momentum_teacher 0.93\n"))  # as of a version with another rule
    for epochs in ("2", "3"):
        args = train.parse_args([*flags, "--epochs", epochs])
        assert args.momentum_teacher == 0.93 and args.out_dim == 256
        assert {*args.auto} == {*PAPER} - {"local_crops_number"}
        train.main(args)
        out = capsys.readouterr().out
        assert "resuming at step" in out and "auto:" not in out  # which would name another number of epochs
    args = train.parse_args([*flags, "--epochs", "300", "--dry_run"])
    train.main(args)
    assert args.momentum_teacher == 0.93 and "2 of 1200" in capsys.readouterr().out
    args = train.parse_args([*flags, "--epochs", "4", "--momentum_teacher", "0.5"])
    assert args.momentum_teacher == 0.5 and "momentum_teacher" not in args.auto and args.patch_size == 8
    train.main(args)
    changed = {line.split(": ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("changed")}
    assert changed == {"--epochs 3 -> 4", "--momentum_teacher 0.93 -> 0.5"}


def test_short_runs_of_photos_say_that_they_are_short(small_shapes, scene, tmp_path, capsys):
    for i in range(8):
        scene.rotate(i).save(tmp_path / f"{i}.png")
    flags = ("--arch vit_tiny --embed_dim 16 --depth 1 --num_heads 2 --device cpu --dry_run --batch_size_per_gpu 8 "
             "--num_workers 0 --knn_every 0 --global_crops_size 32 --local_crops_size 16 "
             f"--output_dir {tmp_path}/run").split()
    for data_path, epochs, is_told in ((tmp_path, "1", True), (tmp_path, "25000", False), ("shapes", "1", False)):
        train.main(train.parse_args([*flags, "--data_path", str(data_path), "--epochs", epochs]))
        assert ("NOTE: 8 images in 1 epochs are few" in capsys.readouterr().out) == is_told


def test_a_resumed_run_keeps_what_was_given(small_shapes, tmp_path, capsys, exit_message):
    """Also if it was resumed by its flags.txt, in which nothing is auto, and if that was edited."""
    path = tmp_path / "run" / "flags.txt"
    flags = ("--arch vit_tiny --embed_dim 16 --depth 1 --num_heads 2 --hidden_dim 16 --bottleneck_dim 8 --device cpu "
             "--local_crops_number 1 --batch_size_per_gpu 64 --num_workers 0 --knn_every 0 --data_path shapes:32 "
             f"--output_dir {tmp_path}/run").split()
    train.main(train.parse_args([*flags, "--epochs", "1", "--out_dim", "99", "--normalization", "measure"]))
    train.main(train.parse_args([f"@{path}", "--epochs", "2"]))
    path.write_text("# repeated\n\n" + path.read_text())
    capsys.readouterr()
    args = train.parse_args([*flags, "--epochs", "3"])
    assert (args.patch_size, args.out_dim, args.momentum_teacher) == (8, 99, 0.9) and len(args.normalization) == 6
    train.main(args)
    assert "resuming at step 8 of 12" in capsys.readouterr().out
    args = train.parse_args(["--arch", "resnet18", *flags[8:], "--epochs", "3"])
    assert "was trained with arch vit_tiny, not resnet18: choose another" in exit_message(train.main, args)
    args = train.parse_args([*flags, "--epochs", "3", "--init", str(tmp_path / "a.pth")])
    assert f"was trained with init None, not {tmp_path}/a.pth: choose another" in exit_message(train.main, args)
