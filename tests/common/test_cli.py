"""Bad input ends with one line and exit status 2."""

import ast
import io
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import evaluate
import export
import retrieve
import segment
import train
import visualize
from backbones import BackboneError
from common import cli
from common.run_flags import write_flags
from common.weights import save_model
from data.datasets import DataError
from vit import VisionTransformer

ROOT = Path(__file__).parents[2]
ERRORS = (DataError, BackboneError, train.CheckpointError, FloatingPointError, export.ExportError)


@pytest.fixture
def bad_inputs(tmp_path):
    """A folder of files and folders that are not what they should be."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "few").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 40)).save(tmp_path / "few" / f"{i}.png")
    for i in range(11):
        (tmp_path / "labels" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (20 * i, 0, 0)).save(tmp_path / "labels" / f"{i % 2}" / f"{i}.png")
    (tmp_path / "broken").mkdir()
    for i in range(70):
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"not an image")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "flags.txt").write_text("--patch_size 7 --local_crops_size 96 # not whole patches\n")
    weights = VisionTransformer(32, 8, embed_dim=64, depth=1, num_heads=1).state_dict()
    save_file(weights, tmp_path / "good.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:5000])
    torch.save({"layer1.0.conv1.weight": torch.ones(3, 3, 3, 3)}, tmp_path / "resnet.pth")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pth").write_text("no checkpoint")
    (tmp_path / "other").mkdir()
    torch.save({"fixed": {"arch": "vit_base"}}, tmp_path / "other" / "checkpoint.pth")
    (tmp_path / "a_file").write_text("")
    (tmp_path / "loop.txt").write_text(f"@{tmp_path}/loop.txt")
    grayscale = VisionTransformer(32, 8, in_chans=1, embed_dim=64, depth=1, num_heads=1).state_dict()
    save_file(grayscale, tmp_path / "one_channel.safetensors")
    save_file(weights | {"blocks.0.ls1.gamma": torch.ones(64)}, tmp_path / "layerscale.safetensors")
    vit = dict(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=1)
    ours = VisionTransformer(**vit).state_dict()
    save_model(tmp_path / "elsewhere.safetensors", ours, dict(backbone=vit, data_path=f"cifar10:{tmp_path}/elsewhere"))
    save_model(tmp_path / "root.safetensors", ours, dict(backbone=vit, data_path="/"))
    save_model(tmp_path / "number.safetensors", ours, dict(backbone=vit, data_path=7))
    save_model(tmp_path / "heads.safetensors", ours, dict(backbone=vit | {"num_heads": -1}))
    torch.save(ours | {"norm.bias": torch.full((64,), float("nan"))}, tmp_path / "nan.pth")
    torch.save(ours | {"pos_embed": torch.ones(1).expand(1, 10**8 + 1, 64)}, tmp_path / "claims.pth")
    flipped = bytearray((tmp_path / "nan.pth").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(flipped)
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "a.jpg")
    (tmp_path / "bombs").mkdir()
    (tmp_path / "bombs" / "a.png").write_bytes(b"P6 60000 60000 255\n")
    (tmp_path / "lines").mkdir()
    Image.new("RGB", (3000, 1)).save(tmp_path / "lines" / "a.png")
    (tmp_path / "voc" / "SegmentationClass").mkdir(parents=True)
    (tmp_path / "davis" / "JPEGImages" / "480p" / "cat").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (40, 40)).save(tmp_path / "davis" / "JPEGImages" / "480p" / "cat" / f"{i}.jpg")
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth" / "gnd_x.pkl").write_bytes(b"cos\nsystem\n(S'echo broken'\ntR.")
    (tmp_path / "model_only").mkdir()
    (tmp_path / "model_only" / "teacher.safetensors").write_bytes(b"weeks of work")
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_small_negative_numbers_are_no_flags(tmp_path):
    (tmp_path / "flags.txt").write_text("--value_range -3.05e-05 -1e-9\n")
    assert tuple(train.parse_args([f"@{tmp_path}/flags.txt", "--device", "cpu"]).value_range) == (-3.05e-05, -1e-9)


SCRIPTS = {"train": (train.main, train.parse_args), "evaluate": (evaluate.main, evaluate.parse_args),
           "export": (export.main, export.parse_args), "segment": (segment.main, segment.parse_args),
           "retrieve": (retrieve.main, retrieve.parse_args), "visualize": (visualize.main, visualize.parse_args)}


@pytest.mark.parametrize("command, words", [
    ("train --no_such_flag", "unrecognized arguments: --no_such_flag"),
    ("train --arch vit_huge", "vit_huge is none of vit_tiny, vit_small, vit_base, vit_large and no classifier of"),
    ("train --arch timm:no_such_net", "timm:no_such_net is none of"),
    ("train --arch resnet50 --patch_size 8",
     "--patch_size is for vit_tiny, vit_small, vit_base, vit_large, not for --arch resnet50"),
    ("train --arch resnet50 --activation_checkpointing", "--activation_checkpointing is for vit_tiny"),
    ("train --arch resnet18 --drop_path_rate 0.1", "resnet18 has no stochastic depth: --drop_path_rate must be 0"),
    ("train --arch timm:vgg11 --drop_path_rate 0.1", "timm:vgg11 cannot be built: "),
    ("train --arch timm:vit_tiny_patch16_224.augreg_in21k", "is none of vit_tiny"),
    ("train --arch maxvit_t --global_crops_size 224 --local_crops_size 96",
     "maxvit_t does not support images of 96 x 96 pixels"),
    ("train --loss mse --centering sinkhorn", "--centering sinkhorn gives probabilities, --loss mse compares logits"),
    ("train --loss infonce --centering batch", "--centering batch gives probabilities, --loss infonce compares logits"),
    ("train --teacher frozen", "--teacher: invalid choice: 'frozen'"),
    ("train --epochs 0", "--epochs: '0' is not an integer above 0"),
    ("train --epochs ten", "'ten' is not an integer"),
    ("train --lr -1", "--lr: '-1' is not a number above 0"),
    ("train --lr nan", "'nan' is not a number"),
    ("train --norm_last_layer maybe", "'maybe' is not true or false"),
    ("train --patch_size 9 --global_crops_size 224", "--global_crops_size 224 is not a multiple of --patch_size 9"),
    ("train --patch_size 16 --global_crops_size 225 --local_crops_size 90",
     "--global_crops_size 225 is not a multiple of --patch_size 16; --local_crops_size 90 is not"),
    ("train --patch_size 16 --local_crops_size 90", "--local_crops_size 90 is not a multiple of --patch_size 16"),
    ("train --local_crops_scale 0.4 0.05", "--local_crops_scale 0.4 0.05 is not an ascending range"),
    ("train --color_jitter 0 0 0 0.7", "half a turn"),
    ("train --embed_dim 100", "--embed_dim 100 is not a multiple of --num_heads 6"),
    ("train --device cuda", "'cuda' is not available here, use cpu"),
    ("train @{}/flags.txt", "not a multiple of --patch_size 7"),
    ("train @{}/missing.txt", "missing.txt"),
    ("train @{}/loop.txt", "not text, or includes itself"),
    ("train @{}/good.safetensors", "is not text, or includes itself"),
    ("train --drop_path_rate 1", "'1' is not a number from 0 to below 1"),
    ("train --data_path {}/missing", "missing: no such folder"),
    ("train --data_path {}/empty", "empty: no such folder, or no image found"),
    ("train --data_path {}/few --batch_size_per_gpu 64", "3 images are fewer than the global batch size 64"),
    ("train --data_path {}/few --batch_size_per_gpu 64", "set --batch_size_per_gpu 3"),
    ("train --data_path {}/broken", "broken: none of its 70 images can be read; the last: "),
    ("train --output_dir {}/run", "checkpoint.pth: not a checkpoint, or corrupt"),
    ("train --output_dir {}/other", "was trained with arch vit_base, not vit_small"),
    ("train --output_dir {}/a_file", "a_file"),
    ("train --resume later", "--resume: invalid choice: 'later'"),
    ("train --overwrite", "starts anew: add --resume none"),
    ("train --keep 0", "--keep: '0' is not an integer above 0"),
    ("train --save_every_minutes -1", "'-1' is not a number of 0 or more"),
    ("train --timeout_minutes 0", "--timeout_minutes: '0' is not a number above 0"),
    ("train --out_dim 2000000000", "out of memory"),
    ("train --epochs 99999999999999999999", "is not an integer above 0 and below 2^31"),
    ("train --num_workers 100000", "--num_workers: '100000' is not a number of processes from 0 to 256"),
    ("train --blur_radius 0 1000", "--blur_radius 1000.0 is more than --global_crops_size 224"),
    ("segment masks --image_size 99999", "--image_size: '99999' is not a number of pixels from 1 to 8192"),
    ("train --embed_dim 10000000 --num_heads 1", "out of memory"),
    ("train --data_path {}/pipes", "none of its 1 images can be read; the last: {}/pipes/a.jpg: is not a regular file"),
    ("train --data_path {}/bombs", "decompression bomb"),
    ("train --data_path {}/lines", "3000 x 1 pixels, one side is more than 100 times the other"),
    ("train --data_path mnist8:{}", "torchvision has no dataset 'mnist8'"),
    ("train --output_dir {}/model_only", "holds teacher.safetensors of a previous run: --resume none --overwrite"),
    ("train --output_dir {}/run --resume none", "holds checkpoint.pth of a previous run: --resume none --overwrite"),
    ("train --output_dir /proc/here", "/proc/here"),
    ("evaluate", "the following arguments are required: TASK"),
    ("evaluate guess", "invalid choice: 'guess'"),
    ("evaluate knn --nb_knn 0", "--nb_knn: '0' is not an integer above 0"),
    ("evaluate knn", "no trained model below runs/"),
    ("evaluate knn --ckpt {}/missing.pth", "missing.pth: no such file"),
    ("evaluate knn --ckpt {}/empty", "empty"),
    ("evaluate knn --ckpt {}/text.pth", "text.pth: not a checkpoint"),
    ("evaluate knn --ckpt {}/text.safetensors", "text.safetensors: not a safetensors file"),
    ("evaluate knn --ckpt {}/cut.safetensors", "cut.safetensors: not a safetensors file, or corrupt"),
    ("evaluate knn --ckpt {}/resnet.pth", "as built here: not the tensors of a ResNet of torchvision"),
    ("evaluate knn --ckpt {}/good.safetensors", "trained on unknown data; name the labeled images with --data_path"),
    ("evaluate knn --ckpt {}/good.safetensors --data_path {}/few", "few: no labels"),
    ("evaluate knn --ckpt {}/good.safetensors --checkpoint_key student", "holds no network named student"),
    ("evaluate knn --ckpt {}/one_channel.safetensors --data_path shapes",
     "shapes: no folder or shard, where images of 1 channel(s) must be"),
    ("evaluate knn --ckpt {}/layerscale.safetensors", "blocks.0.ls1.gamma has no place"),
    ("evaluate knn --ckpt {}/good.safetensors --data_path shapes --image_size 30", "of the model's patch size 8"),
    ("evaluate knn --ckpt {}/elsewhere.safetensors",
     "trained on cifar10:{}/elsewhere; name the labeled images with --data_path"),
    ("evaluate knn --ckpt {}/root.safetensors", "trained on /; name the labeled images with --data_path"),
    ("evaluate knn --ckpt {}/number.safetensors", "trained on 7; name the labeled images with --data_path"),
    ("evaluate knn --ckpt {}/heads.safetensors", "num_heads is -1"),
    ("evaluate knn --ckpt {}/nan.pth", "norm.bias holds NaN or infinity"),
    ("evaluate knn --ckpt {}/claims.pth", "pos_embed has a shape larger than its storage"),
    ("evaluate knn --ckpt {}/flipped.pth", "does not match its checksum"),
    ("evaluate knn --lr 0.1", "unrecognized arguments: --lr 0.1"),
    ("evaluate linear --lr 0", "--lr: '0' is not a number above 0"),
    ("evaluate linear --crop_scale 0.5 0.1", "--crop_scale 0.5 0.1 is not an ascending range above 0"),
    ("evaluate linear --overwrite", "starts anew: add --resume none"),
    ("evaluate linear --features f.safetensors", "--features keeps what --quick extracts"),
    ("evaluate linear --seed 99999999999999999999", "is not an integer from 0 to below 2^63"),
    ("evaluate linear --precision int8", "invalid choice: 'int8'"),
    ("evaluate kn", "did you mean knn?"), ("evaluate knn --nb_nn 5", "did you mean --nb_knn?"),
    ("evaluate finetune --drop_path_rate 1", "'1' is not a number from 0 to below 1"),
    ("evaluate finetune --ckpt {}/good.safetensors --data_path {}/few", "few: no labels"),
    ("evaluate linear --ckpt {}/good.safetensors --data_path {}/labels --test_only", "classifier.safetensors: no such"),
    ("evaluate linear --ckpt {}/good.safetensors --data_path {}/labels --batch_size_per_gpu 4 --output_dir /proc/here",
     "/proc/here"),
    ("evaluate linear --ckpt {}/good.safetensors --data_path {}/labels --quick --output_dir /proc/here", "/proc/here"),
    ("export", "no trained model below runs/"),
    ("export --ckpt {}/text.pth", "text.pth: not a checkpoint"),
    ("export --ckpt {}/good.safetensors --image_size 1 2 3", "takes H [W]"),
    ("export --ckpt {}/good.safetensors --opset 16", "argument --opset: invalid choice: 16"),
    ("export --ckpt {}/good.safetensors --last_layers 2", "--last_layers 2: the model has 1 blocks"),
    ("export --ckpt {}/good.safetensors --dynamic size --image_size 32", "leave it out with --check, and with"),
    ("export --ckpt {}/one_channel.safetensors --normalize nhwc", "takes 1 channels of any depth, --normalize is"),
    ("export --ckpt {}/good.safetensors --format timm --benchmark", "only ONNX files are checked and timed"),
    ("export --ckpt {}/good.safetensors --format dino_full", "holds one network; --format dino_full needs a run's"),
    ("export --ckpt {}/good.safetensors --format transformers --output /proc/here", "/proc: not writable"),
    ("export --check {}/a.onnx --image_size 32", "leave it out with --check"),
    ("export --ckpt {}/good.safetensors --images {}/empty", "empty: no such folder, or no image found"),
    ("export --check {}/missing.onnx", "missing.onnx"),
    ("export --check {}/good.safetensors", "not a file of export.py"),
    ("export --ckpt {}/good.safetensors --image_size 33", "multiples of the model's patch size 8"),
    ("export --ckpt {}/good.safetensors --output {}/good.safetensors/a.onnx", "good.safetensors: is a file"),
    ("export --ckpt {}/good.safetensors --output /proc/model.onnx", "/proc: not writable"),
    ("export --ckpt {}/nan.pth", "norm.bias holds NaN or infinity"),
    ("segment", "the following arguments are required: TASK"),
    ("segment masks --mass 2", "--mass: '2' is not a number from 0 to 1"),
    ("segment masks", "no trained model below runs/"),
    ("segment masks --ckpt {}/one_channel.safetensors", "takes images of 1 channels, here they are RGB"),
    ("segment masks --ckpt {}/good.safetensors --data_path shapes:7",
     "shapes:7: SIZE must be an integer from 16 to 1024 pixels"),
    ("segment masks --ckpt {}/good.safetensors --data_path {}/missing", "missing: no images with masks"),
    ("segment masks --ckpt {}/good.safetensors --data_path {}/few",
     "few: no images with masks; expected images/ beside masks/"),
    ("segment masks --ckpt {}/good.safetensors --data_path {}/voc", "val.txt"),
    ("segment masks --ckpt {}/good.safetensors --data_path {}/davis", "none of its 2 frames has a mask"),
    ("segment video --ckpt {}/good.safetensors", "the following arguments are required: --data_path"),
    ("segment video --ckpt {}/good.safetensors --data_path {}/few", "few: expected JPEGImages/480p/SEQUENCE/FRAME.jpg"),
    ("segment video --ckpt {}/good.safetensors --data_path {}/davis --sequences cat dog", "no frames (*.jpg) in dog"),
    ("segment video --ckpt {}/good.safetensors --data_path {}/davis --topk 0", "'0' is not an integer above 0"),
    ("segment video --ckpt {}/good.safetensors --data_path {}/davis --output_dir /proc/here", "/proc/here"),
    ("retrieve search --ckpt {}/good.safetensors --data_path {}/few", "the following arguments are required: query"),
    ("retrieve search --ckpt {}/good.safetensors --data_path {}/empty {}/few/0.png", "empty: no such folder, or no"),
    ("retrieve search --ckpt {}/good.safetensors --data_path {}/few {}/few/0.png --output_dir /proc/x", "/proc/x"),
    ("retrieve search --ckpt {}/good.safetensors --data_path {}/few {}/few/0.png --image_size 30", "patch size 8"),
    ("retrieve copies --ckpt {}/good.safetensors --data_path {}/few", "few/original: no such folder"),
    ("retrieve copies --ckpt {}/good.safetensors --data_path {}/labels", "labels/original: no such folder"),
    ("retrieve landmarks --ckpt {}/good.safetensors --data_path {}/few", "few: expected gnd_roxford5k.pkl or"),
    ("retrieve landmarks --ckpt {}/good.safetensors --data_path {}/truth", "gnd_x.pkl: not the ground truth of"),
    ("retrieve landmarks --multiscale perhaps", "'perhaps' is not true or false"),
])
def test_one_line_and_status_2(bad_inputs, monkeypatch, capsys, command, words):
    name, *argv = command.replace("{}", str(bad_inputs)).split()
    words = words.replace("{}", str(bad_inputs))
    main, parse_args = SCRIPTS[name]
    monkeypatch.chdir(bad_inputs)
    if name == "train" and not any(flag in argv for flag in ("--arch", "--embed_dim", "--output_dir")):
        argv += ["--output_dir", str(bad_inputs / "new")]
    before = contents(bad_inputs)
    with pytest.raises(SystemExit) as stop:
        cli.run_command(main, lambda: parse_args(argv), *ERRORS)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(error) == 1 and words in error[0] and "Traceback" not in error[0]
    assert contents(bad_inputs) == before


def test_from_the_shell(tmp_path):
    result = subprocess.run([sys.executable, str(ROOT / "train.py"), "--data_path", "nowhere"], cwd=tmp_path, text=True,
                            capture_output=True, timeout=120)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "train.py: nowhere: no such folder, shard, torchvision set (NAME:ROOT) or 'shapes'\n"
    assert list(tmp_path.iterdir()) == []


def test_flag_files_take_comments_and_later_flags_win(tmp_path):
    (tmp_path / "f.txt").write_text("# a recipe\n--epochs 20  # short\n--arch vit_tiny --lr 0.1\n\n")
    args = train.parse_args([f"@{tmp_path}/f.txt", "--lr", "0.2"])
    assert (args.epochs, args.arch, args.lr, args.embed_dim) == (20, "vit_tiny", 0.2, 192)


def test_flag_files_are_quoted_as_in_a_shell(tmp_path, monkeypatch, capsys):
    """Comments only at the start of a word, byte-order marks, paths of any bytes, and ~ as everywhere."""
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "f.txt"
    for text, data_path, output_dir in (
            ("# don't\n--data_path /a#b/c#1 # it's\n--output_dir ~/x", "/a#b/c#1", "/home/me/x"),
            ("--data_path '/a b/#c'#d\r\n--output_dir=~/x\r\n", "/a b/#c#d", "/home/me/x"),
            ('--data_path "/a\nb/\\"" --output_dir /my\\ #1', '/a\nb/"', "/my #1"),
            ("--data_path=imagefolder:~/d\n--output_dir ./~", "imagefolder:/home/me/d", "./~"),
            ("--data_path caf\udce9 --output_dir größe", "caf\udce9", "größe")):
        for mark in (b"", b"\xef\xbb\xbf"):
            file.write_bytes(mark + text.encode("utf-8", "surrogateescape"))
            args = train.parse_args([f"@{file}", "--device", "cpu"])
            assert (args.data_path, args.output_dir) == (data_path, output_dir)
        write_flags(tmp_path / "flags.txt", args)
        again = vars(train.parse_args([f"@{tmp_path}/flags.txt"]))
        assert again | {"auto": args.auto} == vars(args) and not again["auto"]  # all are given
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "f.txt").write_text(f"--epochs 30 @{file}")  # names another
    args = train.parse_args(["@~/f.txt", "--data_path", "~/d"])
    assert (args.epochs, args.data_path, args.output_dir) == (30, f"{tmp_path}/home/d", "größe")
    assert evaluate.parse_args(["knn", "--ckpt", "~/a.pth"]).ckpt == f"{tmp_path}/home/a.pth"
    file.write_text("--data_path /John's\n--epochs 3")
    with pytest.raises(SystemExit):
        train.parse_args([f"@{file}"])
    assert "f.txt: No closing quotation near '/Johns\\n--epochs 3'" in capsys.readouterr().err


SMALL = "--arch vit_tiny --embed_dim 64 --depth 1 --num_heads 1 --out_dim 8 --hidden_dim 8 --device cpu"


def run_and_fail(command, capsys):
    """The one line with which a command ends in exit status 2."""
    name, *argv = command.split()
    main, parse_args = SCRIPTS[name]
    with pytest.raises(SystemExit) as stop:
        cli.run_command(main, lambda: parse_args(argv), *ERRORS)
    [error] = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    return error


def test_pipes_are_refused_not_waited_for(bad_inputs, monkeypatch, capsys):
    """In place of every file that a command opens; a test that hangs has found one."""
    monkeypatch.chdir(bad_inputs)
    for name in ("p", "p.pth", "p.safetensors", "p.onnx", "p.mp4", "gnd_p.pkl", "run/.lock"):
        os.mkfifo(name)
    onnxruntime.set_default_logger_severity(4)
    for command, words in (
            ("train @p", "flag file p: is not a regular file"),
            (f"train {SMALL} --output_dir run --resume none --overwrite", "run/.lock: is not a regular file"),
            ("evaluate knn --ckpt p.pth", "p.pth: is not a regular file"),
            ("evaluate knn --ckpt p.safetensors", "p.safetensors: is not a regular file"),
            ("evaluate knn --ckpt good.safetensors --data_path labels --features p.safetensors", "p.safetensors: is"),
            ("export --check p.onnx", "p.onnx: is not a regular file"),
            ("retrieve landmarks --ckpt good.safetensors --data_path .", "is not a regular file"),
            ("visualize attention few/0.png --ckpt p.onnx --output_dir o", "no such file, or a pipe or device"),
            ("visualize crops few/0.png --flags p", "flag file p: is not a regular file"),
            ("visualize run p", "p/log.jsonl: no such log"),
            ("visualize video p.mp4 o.mp4 --ckpt good.safetensors", "p.mp4: is not a regular file"),
            ("visualize video http://localhost/a.mp4 o.mp4", "http://localhost/a.mp4: no such file or folder")):
        assert words in run_and_fail(command, capsys), command


def test_errors_of_the_system_name_the_path_and_the_fix(bad_inputs, monkeypatch, capsys):
    monkeypatch.chdir(bad_inputs)
    for command, words in (
            (f"train {SMALL} --output_dir a_file", "a_file: is a file: name a folder, or one that is not there yet"),
            (f"train {SMALL} --output_dir a_file/x", "a_file/x: a part of this path is a file: name another"),
            ("train @none.txt", "error: flag file none.txt: no such file or folder"),
            ("evaluate knn --ckpt a.onnx", "a.onnx: is an exported file, for export.py run (infer.py) and visualize.py "
             "attention; name the file it was made from, such as teacher.safetensors")):
        assert run_and_fail(command, capsys).endswith(words), command


@pytest.mark.parametrize("flags", [["--output_dir", ""], ["--data_path="], ["--arch", "vit_tiny", "--output_dir", ""]])
def test_an_empty_path_of_an_unset_variable_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as error:
        train.parse_args(flags)
    assert error.value.code == 2 and "empty" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        evaluate.parse_args(["knn", "--ckpt", ""])
    assert error.value.code == 2 and "empty argument after knn --ckpt" in capsys.readouterr().err


# ---- Python, terminals, signals ----

COMMANDS = [path for path in ROOT.glob("*.py") if "run_command" in path.read_text()]


def test_an_old_python_is_named_before_anything_is_imported(monkeypatch, capsys):
    """The first statements must be ones that it can read."""
    assert {path.stem for path in COMMANDS} == {"train", "evaluate", "export", "segment", "retrieve", "visualize"}
    start = ROOT / "common" / "__init__.py"
    for path in (start, *COMMANDS):
        ast.parse(path.read_text(), feature_version=(3, 8))
    for path in COMMANDS:
        statement = ast.parse(path.read_text()).body[1]  # after the docstring
        assert isinstance(statement, ast.Import) and statement.names[0].name == "common", path
    minimum = re.search(r'requires-python = ">=3.(\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    monkeypatch.setattr(sys, "version_info", (3, int(minimum) - 1, 13))
    monkeypatch.setattr(sys, "argv", ["here/train.py"])
    with pytest.raises(SystemExit) as stop:
        exec(compile(start.read_text(), start, "exec"), {"__path__": [str(start.parent)]})
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"train.py: needs Python 3.{minimum} or later, this is ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.stem)
def test_ctrl_c_during_imports_is_one_line(command, tmp_path):
    """Where an exception would be lost: torch, and onnx before it, in place of which a module interrupts."""
    for name in ("torch", "onnx", "numpy"):
        (tmp_path / f"{name}.py").write_text("import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n"
                                             "    print(end='')\nexcept KeyboardInterrupt:\n    raise ImportError\n")
    result = subprocess.run([sys.executable, str(command), "--help"], capture_output=True, text=True, timeout=60,
                            env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (result.returncode, result.stderr) == (130, f"{command.name}: interrupted\n")


@pytest.mark.parametrize("name, status, words", [
    ("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "stopped by SIGTERM"), ("SIGHUP", 129, "stopped by SIGHUP")])
def test_a_signal_is_one_line_and_its_status(capsys, name, status, words):
    number, cleaned = getattr(signal, name), []

    def main(args):
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait(60)
        finally:
            cleaned.append(True)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        cli.run_command(main, lambda: None)
    assert (stop.value.code, cleaned, signal.getsignal(number)) == (status, [True], before)
    assert capsys.readouterr().err.endswith(f": {words}\n")


class NotebookStream(io.StringIO):
    """Like ipykernel's OutStream: neither `reconfigure` nor a file descriptor."""

    @property
    def reconfigure(self):
        raise AttributeError


def test_runs_in_a_notebook_and_its_threads(monkeypatch):
    stream = NotebookStream()
    monkeypatch.setattr(sys, "stdout", stream)
    handler = signal.getsignal(signal.SIGINT)
    for run in (lambda function: function(), lambda function: threading.Thread(target=function).start()):
        run(lambda: cli.run_command(lambda args: print("seen"), lambda: None))
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(60)
    assert stream.getvalue() == "seen\nseen\n" and signal.getsignal(signal.SIGINT) == handler


def test_closed_output_is_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)  # python train.py >&-
    cli.run_command(lambda args: print("unseen"), lambda: None)
    reader, writer = os.pipe()
    os.close(reader)  # python train.py | head -1
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as stop:
            cli.run_command(lambda args: print("unread"), lambda: None)
        assert stop.value.code == 141 and "broken pipe" in capsys.readouterr().err
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # or closing fails


def test_the_rank_that_a_launcher_adds_is_no_flag():
    assert evaluate.parse_args(["--local-rank=0", "knn", "--nb_knn", "5"]).nb_knn == [5]
    assert train.parse_args(["--local_rank=3", "--epochs", "20"]).epochs == 20
