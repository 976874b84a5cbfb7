"""Images of other channels than RGB, in every command: 5 channels of 16 bits, generated."""

import json
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import evaluate
import export
import infer
import retrieve
import segment
import train
import visualize
from common.initial_weights import read_initial_weights
from common.weights import load_backbone, save_model
from data.datasets import DataError, open_data
from data.sample import measure_normalization
from data.shards import open_index
from vit import VisionTransformer

tifffile = pytest.importorskip("tifffile")
TINY = ("--patch_size 8 --embed_dim 32 --depth 2 --num_heads 2 --out_dim 64 --hidden_dim 32 --bottleneck_dim 16 "
        "--global_crops_size 32 --local_crops_size 16 --local_crops_number 2 --batch_size_per_gpu 8 --num_workers 0 "
        "--device cpu --blur_radius 0.1 1 --epochs 2 --warmup_epochs 0 --knn_every 1").split()


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Two classes of 5-channel images of 16 bits, whose difference is in the lowest 8 bits of channel 4 alone."""
    root, rng = tmp_path_factory.mktemp("cells"), np.random.RandomState(0)
    for part, count in (("train", 12), ("val", 5)):
        for label in range(2):
            (root / part / "ab"[label]).mkdir(parents=True)
            for i in range(count):
                pixels = rng.randint(0, 60_000, (5, 40, 48)).astype("uint16")
                pixels[4] = 32_768 + 200 * label + rng.randint(0, 20, (40, 48))
                options = (dict(photometric="minisblack"), dict(planarconfig="separate", photometric="minisblack"),
                           dict(planarconfig="contig", photometric="minisblack"))[i % 3]  # pages, planar, interleaved
                values = pixels.transpose(1, 2, 0) if i % 3 == 2 else pixels
                tifffile.imwrite(root / part / "ab"[label] / f"{i}.tif", values, **options)
    return root


@pytest.fixture(scope="module")
def trained(cells, tmp_path_factory):
    """A run on them."""
    output = tmp_path_factory.mktemp("runs") / "run"
    flags = [*TINY, "--data_path", str(cells), "--channels", "5", "--rotate90", "--output_dir", str(output)]
    train.main(train.parse_args(flags))
    return output, flags


def read_bands(path, info, size):
    """All channels of a .tif in [0, 1], resized to (width, height) by Pillow in place of torch: [5, height, width]."""
    pixels = tifffile.imread(path)
    pixels = pixels if len(pixels) == 5 else pixels.transpose(2, 0, 1)
    (low, high), scaled = info["value_range"], pixels.astype("float32")
    return torch.from_numpy(np.stack([np.asarray(Image.fromarray((x - low) / (high - low)).resize(size, 3))
                                      for x in scaled]))


def read_view(path, info):
    """The evaluation view of a .tif of 48 x 40 pixels at 32 x 32: shorter side 32 * 8/7, then the center."""
    crop = read_bands(path, info, (44, 37))[:, 2:34, 6:38].clamp(0, 1)
    return (crop - torch.tensor(info["mean"]).view(-1, 1, 1)) / torch.tensor(info["std"]).view(-1, 1, 1)


def test_training_measures_and_stores_the_input(cells, trained, exit_message):
    output, flags = trained
    backbone, info = load_backbone(str(output / "teacher.safetensors"))
    files = sorted((cells / "train").rglob("*.tif"))
    pixels = np.stack([x if len(x) == 5 else x.transpose(2, 0, 1) for x in map(tifffile.imread, files)]) / 65535
    assert backbone.in_chans == info["channels"] == 5 and info["value_range"] == [0, 65535]
    np.testing.assert_allclose(info["mean"], pixels.mean(axis=(0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(info["std"], pixels.std(axis=(0, 2, 3)), atol=1e-6)
    resolved = (output / "flags.txt").read_text()
    assert "--channels 5" in resolved
    assert f"--normalization {' '.join(map(str, info['mean'] + info['std']))}" in resolved
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert {"raw pixels", "untrained backbone", "epoch 0", "epoch 1"} <= {line.get("eval") for line in log}
    line = exit_message(train.main, train.parse_args([*flags, "--normalization", *["0.5"] * 10]))
    assert "was trained with normalization (0.45" in line


def test_evaluation_and_export_read_the_same_pixels(cells, trained, tmp_path, capsys):
    path = str(trained[0] / "teacher.safetensors")
    backbone, info = load_backbone(path)
    files = sorted((cells / "val").rglob("*.tif"))
    with torch.no_grad():
        expected, maps = backbone.forward_with_attention(torch.stack([read_view(file, info) for file in files]))
    features = tmp_path / "features.safetensors"
    run = ["--ckpt", path, "--data_path", str(cells), "--device", "cpu", "--num_workers", "0"]
    evaluate.main(evaluate.parse_args(["knn", *run, "--nb_knn", "1", "--features", str(features)]))
    np.testing.assert_allclose(load_file(features)["test_features"], expected, atol=1e-4)

    onnx = str(tmp_path / "model.onnx")
    export.main(export.parse_args(["--ckpt", path, "--output", onnx, "--images", str(cells / "val")]))
    assert "at most" in capsys.readouterr().out  # verified against torch, on these images too
    export.main(export.parse_args(["--check", onnx]))
    session, metadata = infer.open_model(onnx)
    assert metadata["channels"] == 5 and metadata["mean"] == info["mean"]
    for file, feature, attention in zip(files, expected, maps):
        found = infer.infer(session, metadata, infer.prepare(infer.read_channels(str(file), metadata), metadata))
        np.testing.assert_allclose(found[0], feature, atol=1e-4)
        np.testing.assert_allclose(found[1].reshape(2, -1), attention, atol=1e-5)
    assert infer.main([onnx, *map(str, files), "--output", str(tmp_path / "maps")]) == 0
    assert len(list((tmp_path / "maps").glob("*.attention.png"))) == len(files)


def test_runs_continue_with_the_images_of_the_weights(cells, trained, tmp_path, capsys):
    """Channels, normalization and range of a model file; those of RGB are repeated for a run with --channels."""
    path, run = str(trained[0] / "teacher.safetensors"), ["--data_path", str(cells), "--output_dir", f"{tmp_path}/run"]
    info, sizes = load_backbone(path)[1], TINY[TINY.index("--global_crops_size"):]
    args = train.parse_args(["--init", path, *sizes, *run])
    assert args.channels == 5 and args.normalization == (*info["mean"], *info["std"])
    assert args.value_range == [0, 65535] and train.model_arguments(args)[0]["in_chans"] == 5
    args = train.parse_args(["--init", path, *sizes, *run, "--normalization", "measure", "--value_range", "0", "9"])
    assert args.normalization == ("measure",) and args.value_range == [0, 9]
    assert train.parse_args(["--init", path, *sizes, *run, "--channels", "4"]).normalization == ("measure",)
    rgb = Path(__file__).parent / "fixtures" / "reference_checkpoint" / "checkpoint.pth"
    args = train.parse_args(["--init", str(rgb), *sizes, *run])
    assert args.channels is None and args.normalization == ("imagenet",) and args.value_range is None

    flags = ["--init", str(rgb), *sizes, *run, "--channels", "5", "--epochs", "1", "--views", "device",
             "--momentum_teacher", "0.9995", "--lr", "0.0001"]
    train.main(train.parse_args(flags))
    out = capsys.readouterr().out
    assert "patch embedding of 3 channels repeated to 5" in out and "channels 5; flags given by hand win" in out
    backbone, found = load_backbone(f"{tmp_path}/run")
    assert backbone.in_chans == 5 and found["value_range"] == [0, 65535] and found["mean"] == info["mean"]
    before = read_initial_weights(str(rgb), str).teacher["backbone"]["patch_embed.proj.weight"]
    after = backbone.patch_embed.proj.weight.detach()  # close to where it began
    torch.testing.assert_close(after, before[:, [0, 1, 2, 0, 1]] * 3 / 5, rtol=0, atol=1e-3)
    train.main(train.parse_args([*sizes, *run, "--epochs", "2"]))
    assert "resuming at step 3 of 6" in capsys.readouterr().out


def test_visualizations_show_the_chosen_channels(cells, trained, tmp_path, exit_message, capsys):
    path, file = str(trained[0] / "teacher.safetensors"), str(cells / "val" / "a" / "0.tif")
    out = ["--ckpt", path, "--device", "cpu", "--output_dir", str(tmp_path)]
    seen = []
    for channels in ("2", "4 2 0"):
        flags = [file, *out, "--show_channels", *channels.split()]
        visualize.main(visualize.parse_args(["attention", *flags, "--raw"]))
        seen.append(np.asarray(Image.open(tmp_path / "0.tif.attention.png")))
        visualize.main(visualize.parse_args(["features", *flags]))
    assert seen[0].shape == seen[1].shape and (seen[0] != seen[1]).any()
    backbone, info = load_backbone(path)
    maps = np.load(tmp_path / "0.tif.npy")
    with torch.no_grad():  # the shorter side is resized to 480/224 of that in training, in patches of 8
        x = (read_bands(file, info, (88, 72)) - torch.tensor(info["mean"]).view(-1, 1, 1)) / torch.tensor(
            info["std"]).view(-1, 1, 1)
        expected = backbone.get_last_selfattention(x[None])[0, :, 0, 1:].view(2, 9, 11)
    np.testing.assert_allclose(maps, expected, atol=1e-4)
    visualize.main(visualize.parse_args(["crops", file, "--flags", str(trained[0] / "flags.txt"), "--output_dir",
                                         str(tmp_path)]))
    assert (tmp_path / "0.tif.crops.png").exists()
    assert "--show_channels 5: the images have channels 0 to 4" in exit_message(
        lambda: visualize.main(visualize.parse_args(["attention", file, *out, "--show_channels", "5"])))
    with pytest.raises(SystemExit):
        visualize.parse_args(["attention", file, "--show_channels", "1", "2"])
    assert "expected one channel or three" in capsys.readouterr().err


def test_classifiers_and_commands_that_take_rgb(cells, trained, tmp_path, exit_message, monkeypatch):
    path = str(trained[0] / "teacher.safetensors")
    flags = ["--ckpt", path, "--device", "cpu", "--num_workers", "0", "--data_path", str(cells)]
    evaluate.main(evaluate.parse_args(["finetune", *flags, "--epochs", "1", "--batch_size_per_gpu", "8", "--val_freq",
                                       "0", "--output_dir", str(tmp_path)]))
    classifier = str(tmp_path / "classifier.safetensors")
    predictions, file = tmp_path / "predictions.csv", cells / "val" / "b" / "1.tif"
    evaluate.main(evaluate.parse_args(["predict", str(file), "--ckpt", classifier, "--device", "cpu", "--num_workers",
                                       "0", "--output", str(predictions)]))
    row = predictions.read_text().splitlines()[1].split(",")
    export.main(export.parse_args(["--ckpt", classifier]))
    session, metadata = infer.open_model(str(tmp_path / "classifier.onnx"))
    outputs = infer.run_model(session, metadata, infer.prepare(infer.read_channels(str(file), metadata), metadata))
    probabilities = infer.softmax(outputs["logits"])
    assert metadata["classes"][probabilities.argmax()] == row[1]
    assert probabilities.max() == pytest.approx(float(row[2]), abs=1e-4)
    for folder in ("original", "strong"):
        (tmp_path / "copydays" / folder).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "copydays" / folder / "2000.jpg")
    for command, argv in ((retrieve, ["copies", *flags[:-2], "--data_path", str(tmp_path / "copydays")]),
                          (segment, ["masks", *flags[:-2], "--data_path", "shapes"]),
                          (visualize, ["video", str(file.parent), str(tmp_path / "maps"), *flags[:4]])):
        line = exit_message(command.main, command.parse_args(argv))
        assert "takes images of 5 channels, here they are RGB" in line
    line = exit_message(train.main, train.parse_args([*TINY, "--channels", "4", "--data_path", str(cells),
                                                      "--output_dir", str(tmp_path / "four")]))
    assert "expected 4 channels, first or last" in line
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert "pip install tifffile" in exit_message(train.main, train.parse_args([*trained[1], "--resume", "none"]))


def test_search_compares_the_features_of_channels(cells, trained, tmp_path, capsys):
    path, queries = str(trained[0] / "teacher.safetensors"), sorted((cells / "val").rglob("*.tif"))
    backbone, info = load_backbone(path)
    with torch.no_grad():
        features = F.normalize(backbone(torch.stack([read_view(file, info) for file in queries])))
    sheets = []
    for channels in ("4", "0"):
        retrieve.main(retrieve.parse_args([
            "search", str(queries[2]), "--ckpt", path, "--data_path", str(cells / "val"), "--nearest", "9", "--device",
            "cpu", "--num_workers", "0", "--output_dir", str(tmp_path), "--show_channels", channels]))
        sheets.append(np.asarray(Image.open(tmp_path / "val" / "2.tif.nearest.png")))
    found = re.findall(r"^ +(-?\d\.\d{3})  (.*\.tif)$", capsys.readouterr().out, re.MULTILINE)
    similarity = dict(zip(map(str, queries), (features @ features[2]).tolist()))
    assert len(found) == 18 and {name for _, name in found} == similarity.keys() - {str(queries[2])}
    for score, name in found:
        assert float(score) == pytest.approx(similarity[name], abs=2e-3)  # the index is in half precision
    assert sheets[0].shape == sheets[1].shape and (sheets[0] != sheets[1]).any()


def test_embedding_of_channels(cells, trained, tmp_path):
    pytest.importorskip("matplotlib")
    visualize.main(visualize.parse_args(["embedding", "--ckpt", str(trained[0] / "teacher.safetensors"), "--data_path",
                                         str(cells), "--device", "cpu", "--num_workers", "0", "--output_dir",
                                         str(tmp_path), "--show_channels", "4"]))
    pixels = np.asarray(Image.open(tmp_path / "teacher.embedding.thumbnails.png").convert("RGB"))
    assert pixels.std() > 5


def test_shards_of_channels_are_those_of_a_folder(cells, tmp_path):
    """TIFFs and .npy arrays; without channels the arrays are no images, and the index is another one."""
    with tarfile.open(tmp_path / "cells.tar", "w") as tar, zipfile.ZipFile(tmp_path / "arrays.zip", "w") as archive:
        for file in sorted((cells / "train").rglob("*.tif")):
            name = file.relative_to(cells / "train")
            tar.add(file, name)
            np.save(tmp_path / "a.npy", tifffile.imread(file))
            archive.write(tmp_path / "a.npy", name.with_suffix(".npy"))
            archive.writestr(str(name.with_suffix(".xml")), "")
    paths = cells / "train", tmp_path / "cells.tar", tmp_path / "arrays.zip"
    folder, *shards = (open_data(str(path), cache_dir=str(tmp_path), channels=5).train for path in paths)
    for shard in shards:
        assert folder.value_range == shard.value_range == (0, 65535) and len(folder) == len(shard) == 24
        for i in range(24):
            assert torch.equal(folder[i][0], shard[i][0]) and folder[i][1] == shard[i][1]
        assert measure_normalization(shard) == measure_normalization(folder)
    assert shard.passed_over == " (passed over 24: 24 .xml)"
    assert open_index([str(paths[1])], str(tmp_path)).file.name != shards[0].index.file.name
    with pytest.raises(DataError, match=r"no image in 1 shard.* 24 \.npy, 24 \.xml"):
        open_data(str(paths[2]), cache_dir=str(tmp_path))


@pytest.mark.parametrize("flags, words", [
    ("--channels 5 --arch resnet18", "--channels 5 is for vit_tiny"),
    ("--channels 5 --normalization imagenet", "expected measure, or 5 means and 5 positive standard deviations"),
    ("--channels 1 --normalization 0.5 0", "expected measure, or 1 means"),
    ("--normalization 0.5 0.5 measure 1 1 1", "expected measure, or 3 means")])
def test_flags_that_do_not_fit(flags, words, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(flags.split())
    assert words in capsys.readouterr().err


def test_measured_statistics_of_rgb_reach_every_view(tmp_path, monkeypatch):
    """RGB with --normalization measure: crops, evaluation and export normalize by the values of the data."""
    rng = np.random.RandomState(0)
    for i in range(20):
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = rng.randint(0, (60, 120, 240), (32, 32, 3)).astype("uint8")
        Image.fromarray(pixels).save(tmp_path / "data" / "ab"[i % 2] / f"{i}.png")
    train_step, crops = train.train_step, []
    monkeypatch.setattr(train, "train_step", lambda *args, **more: (
        crops.append(args[5][0][0]) or train_step(*args, **more)))
    train.main(train.parse_args([*TINY, "--normalization", "measure", "--data_path", str(tmp_path / "data"),
                                 "--output_dir", str(tmp_path / "run"), "--vertical_flip",
                                 "--color_jitter", "0", "0", "0", "0"]))
    means = torch.cat(crops).mean(dim=(2, 3)).median(dim=0).values  # a fifth of the crops are gray
    assert means.abs().max() < 0.3  # with those of ImageNet -1.6 for red
    path = str(tmp_path / "run" / "teacher.safetensors")
    backbone, info = load_backbone(path)
    files = sorted((tmp_path / "data").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) / 255 for file in files])
    np.testing.assert_allclose(info["mean"], pixels.mean(axis=(0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(info["std"], pixels.std(axis=(0, 1, 2)), atol=1e-6)
    x = torch.from_numpy((pixels[:1] - info["mean"]) / info["std"]).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected, maps = backbone.forward_with_attention(x)
    flags = ["--ckpt", path, "--device", "cpu"]
    features = tmp_path / "features.safetensors"
    evaluate.main(evaluate.parse_args(["knn", *flags, "--num_workers", "0", "--data_path", str(tmp_path / "data"),
                                       "--nb_knn", "1", "--features", str(features)]))
    np.testing.assert_allclose(load_file(features)["test_features"][:1], expected, atol=1e-4)
    visualize.main(visualize.parse_args(["attention", *flags, str(files[0]), "--image_size", "32", "--raw",
                                         "--output_dir", str(tmp_path)]))
    np.testing.assert_allclose(np.load(tmp_path / f"{files[0].name}.npy").reshape(2, -1), maps[0], atol=1e-5)
    export.main(export.parse_args(["--ckpt", path, "--normalize", "nhwc"]))
    session, metadata = infer.open_model(str(tmp_path / "run" / "teacher.onnx"))
    assert metadata["channels"] is None
    found = infer.infer(session, metadata, infer.prepare(Image.open(files[0]), metadata))[0]
    np.testing.assert_allclose(found, expected[0], atol=1e-4)
    # search compares cosine similarities of the same features
    retrieve.main(retrieve.parse_args(["search", str(files[0]), *flags, "--num_workers", "0", "--data_path",
                                       str(tmp_path / "data"), "--output_dir", str(tmp_path / "search")]))
    index, = (tmp_path / "search").glob("*.safetensors")
    similarity = F.cosine_similarity(load_file(index)["features"][:1].float(), expected)
    assert similarity > 0.99999


def test_wrong_descriptions_are_one_line(cells, tmp_path, exit_message):
    vit = dict(img_size=16, patch_size=8, in_chans=5, embed_dim=16, depth=1, num_heads=2)
    weights = {f"backbone.{name}": x for name, x in VisionTransformer(**vit).state_dict().items()}
    good, path = dict(backbone=vit, channels=5, mean=[0.5] * 5, std=[0.5] * 5), str(tmp_path / "a.safetensors")
    flags = ["knn", "--ckpt", path, "--data_path", str(cells), "--device", "cpu", "--num_workers", "0"]
    for wrong in (dict(channels=4), dict(channels="5"), dict(mean=[0.5] * 3), dict(std=[0, 1, 1, 1, 1]), dict(mean=7),
                  dict(mean=["a"] * 5), dict(std=[float("nan")] * 5)):
        save_model(path, weights, good | wrong)
        assert "is not described as a model of 5 channels" in exit_message(evaluate.main, evaluate.parse_args(flags))
    save_model(path, weights, dict(backbone=vit))  # of another library: values in [-1, 1]
    evaluate.main(evaluate.parse_args(flags))
