import json
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from torchvision.transforms import functional as TF

import segment
from augment import IMAGENET_MEAN, IMAGENET_STD
from common.weights import load_backbone, save_model
from data.semantic import open_semantic
from data.shapes import Shapes
from plotting.draw import COLORS
from tests.evaluation.test_discovery import flood, lost_by_definition, tokencut_by_definition
from tests.evaluation.test_label_propagation import by_definition
from tests.evaluation.test_masks import f_by_definition
from vit import VisionTransformer

PALETTE = [0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200] + [9] * 756


@pytest.fixture
def davis(tmp_path):
    """Two sequences: one of three objects on noise, two of which leave and enter, and one with binary masks.

    Masks with a palette have a rim of 255, unlabeled.
    """
    root, rng = tmp_path / "DAVIS", np.random.default_rng(0)
    for name, colored in (("pair", True), ("single", False)):
        background = rng.integers(0, 256, (100, 150, 3)).astype(np.uint8)
        for t in range(6):
            frame, mask = background.copy(), np.zeros((100, 150), np.uint8)
            corners = (20, 10 + 8 * t, 240), (60, 70 - 40 * t, 20), (60, 20 * t - 30, 120)
            for number, (top, left, color) in enumerate(corners, start=1):
                area = slice(top, top + 30), slice(max(left, 0), max(left + 30, 0))
                if number == 1 or colored:
                    frame[area], mask[area] = (color, 255 - color, color), number if colored else 255
            if colored:
                mask[:, 146:] = 255
            for kind, array in (("JPEGImages", frame), ("Annotations", mask)):
                path = root / kind / "480p" / name / f"{t:05}.{'jpg' if kind == 'JPEGImages' else 'png'}"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(array)
                if kind == "Annotations" and colored:
                    image.putpalette(PALETTE)
                image.save(path, quality=95)
    return root


def run(*argv):
    segment.main(segment.parse_args([str(x) for x in argv] + ["--num_workers", "0", "--device", "cpu"]))


# ---- masks ----

def jaccard_of_attention(network, image, truths, size, mass, void=False):
    """[heads + mean, objects], from the full attention matrix, patch by patch."""
    height, width = truths[0].shape
    rows, cols = (max(1, round(side * size / min(height, width) / 8)) for side in (height, width))
    x = F.interpolate(TF.to_tensor(image)[None], (rows * 8, cols * 8), mode="bicubic", antialias=True)[0]
    x = TF.normalize(x, IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        attention = network.get_last_selfattention(x[None])[0, :, 0, 1:].double().numpy()
    result = []
    for row in [*attention, attention.mean(axis=0)]:
        kept, total = set(), 0.0
        for patch in np.argsort(-row):
            if total >= mass * row.sum():
                break
            kept.add(int(patch))
            total += row[patch]
        mask = np.array([[int((y + 0.5) * rows / height) * cols + int((x + 0.5) * cols / width) in kept
                          for x in range(width)] for y in range(height)])
        result.append([(mask & truth).sum() / ((mask | truth) & ~np.array(void)).sum() for truth in truths])
    return np.array(result)


def test_masks_of_shapes_equal_the_definition(model, capsys, monkeypatch):
    grids, draw = [], segment.sheet.contact_sheet
    monkeypatch.setattr(segment.sheet, "contact_sheet", lambda new, *args: grids.append(new) or draw(new, *args))
    drawn_masks, draw_masks = [], segment.draw_masks
    monkeypatch.setattr(segment, "draw_masks", lambda image, mask, *args: (
        drawn_masks.append(mask.numpy()), draw_masks(image, mask, *args))[1])
    network, path = model
    run("masks", "--ckpt", path, "--data_path", "shapes:32", "--num_images", 5, "--image_size", 64, "--mass", 0.5)
    result = json.loads(next(path.parent.glob("teacher.masks.*.json")).read_text())
    assert result["num_images"] == 5 and result["skipped"] == []
    torch.manual_seed(0)
    untrained = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4).eval()
    for name, weights in (("trained", network), ("untrained", untrained)):
        tables = []
        for i in range(0, 2000, 400):
            image, mask = Shapes("test", 2000, 32).render(i)
            tables.append(jaccard_of_attention(weights, image, [mask.numpy()], 64, 0.5)[:, 0])
        found = result["jaccard"][name]
        assert found["best_head"] == pytest.approx(100 * np.mean([t[:4].max() for t in tables]))
        assert found["mean_of_heads"] == pytest.approx(100 * np.mean([t[4] for t in tables]))
        assert found["heads"] == pytest.approx(100 * np.mean([t[:4] for t in tables], axis=0))
    assert result["jaccard"]["trained"] != result["jaccard"]["untrained"]
    cells, columns = grids[0][0]
    assert len(cells) == columns == 5 and len([*path.parent.glob("teacher.masks.*.png")]) == 1
    for i, best, (drawn, caption) in zip(range(0, 2000, 400), drawn_masks, cells):
        image, mask = Shapes("test", 2000, 32).render(i)
        scores = jaccard_of_attention(network, image, [mask.numpy()], 64, 0.5)[:4, 0]
        assert caption == f"head {scores.argmax() + 1}, Jaccard index {100 * scores.max():.1f}%"
        overlap, union = (best & mask.numpy()).sum(), (best | mask.numpy()).sum()
        assert overlap / union == pytest.approx(scores.max())
        pixels, side = np.asarray(drawn), drawn.width
        middle = mask.numpy()[np.ix_(*[((np.arange(side) + 0.5) * 32 / side).astype(int)] * 2)]
        white = (pixels == 255).all(axis=-1)  # the outline lies in the object
        assert 0 <= (white & ~middle).sum() < 0.01 * white.sum()  # nearest pixels may differ on a tie
        assert (pixels == COLORS[0]).all(axis=-1).any()
    best, out = result["jaccard"]["trained"]["best_head"], capsys.readouterr().out
    assert f"\ntrained    best head {best:.1f}  " in out and "shorter side 64\n" in out


def test_masks_are_tinted_and_objects_outlined():
    mask, objects = torch.zeros(20, 20, dtype=torch.bool), torch.zeros(2, 20, 20, dtype=torch.bool)
    mask[:, :10], objects[0, 4:16, 4:10], objects[1, 4:16, 10:16] = True, True, True
    drawn = segment.draw_masks(torch.zeros(3, 20, 20), mask, objects, 200)
    tint = tuple(round(0.4 * value) for value in COLORS[0])
    assert [drawn.getpixel(place) for place in ((20, 100), (80, 100), (130, 100), (180, 100), (41, 100))] == [
        tint, tint, (0, 0, 0), (0, 0, 0), (255, 255, 255)]


def test_untrained_is_evaluated_alone(model, capsys):
    _, path = model
    run("masks", "--ckpt", path, "--num_images", 2, "--untrained")
    result = json.loads((path.parent / "teacher.untrained.masks.shapes.json").read_text())
    assert list(result["jaccard"]) == ["untrained"] and result["image_size"] == 72  # 480 / 224 * 32, rounded to patches


def test_each_object_has_its_best_head(model, davis):
    network, path = model
    run("masks", "--ckpt", path, "--data_path", davis, "--image_size", 64)
    best = []
    for name in ("pair", "single"):
        for t in range(6):
            values = np.asarray(Image.open(davis / "Annotations" / "480p" / name / f"{t:05}.png"))
            image = Image.open(davis / "JPEGImages" / "480p" / name / f"{t:05}.jpg")
            void = (values == 255) & (name == "pair")
            truths = [values == number for number in np.unique(values[~void]) if number]
            best.append(jaccard_of_attention(network, image, truths, 64, 0.6, void)[:4].max(axis=0).mean())
    result = json.loads(next(path.parent.glob("teacher.masks.*.json")).read_text())
    assert result["num_images"] == 12
    assert result["jaccard"]["trained"]["best_head"] == pytest.approx(100 * np.mean(best))


def test_corrupt_masks_are_skipped_and_empty_ones_have_no_object(model, davis, tmp_path, exit_message):
    _, path = model
    Image.new("L", (10, 10), 255).save(davis / "Annotations" / "480p" / "single" / "00002.png")
    Image.new("L", (150, 100)).save(davis / "Annotations" / "480p" / "single" / "00003.png")
    line = exit_message(run, "masks", "--ckpt", path, "--data_path", davis, "--write", tmp_path / "out")
    assert "skipped 1 of 12 images; the first: " in line
    assert "00002.png: the mask has 10 x 10 pixels, its image 150 x 100" in line
    result = json.loads(next(path.parent.glob("teacher.masks.*.json")).read_text())
    assert result["num_images"] == 10 and len(result["skipped"]) == 1
    coco = json.loads((tmp_path / "out" / "boxes.json").read_text())
    assert len(coco["images"]) == 11 and (tmp_path / "out/JPEGImages/480p/single/00003.png").exists()
    (davis / "Annotations" / "480p" / "single" / "00002.png").unlink()
    flags = "discover", "--ckpt", path, "--method", "lost", "--image_size", 64, "--data_path"
    run(*flags, davis, "--write", tmp_path / "lost")
    result = json.loads((path.parent / "teacher.lost.DAVIS.json").read_text())
    ious = {row["file"][-16:]: row["iou"] for row in result["objects"]}
    assert len(ious) == 11 and [name for name, iou in ious.items() if iou is None] == ["single/00003.jpg"]
    assert result["num_images"] == 10 and result["skipped"] == []
    assert result["corloc"] == 10 * sum(iou >= 0.5 for iou in ious.values() if iou is not None)
    for mask in (davis / "Annotations").rglob("*.png"):
        Image.new("L", (150, 100)).save(mask)
    assert "DAVIS: none of its images can be used, their masks are empty" in exit_message(
        run, "masks", "--ckpt", path, "--data_path", davis)
    run(*flags, davis)
    assert json.loads((path.parent / "teacher.lost.DAVIS.json").read_text())["corloc"] is None


def test_attention_masks_are_written_as_weak_labels(model, tmp_path, capsys, exit_message):
    """Of the mean of the heads, for images without masks too; boxes as in COCO; evaluate.py segmentation takes them."""
    network, path = model
    for i in range(4):
        image = Shapes("test", 4, 48).render(i)[0].resize((48, 40))
        (tmp_path / "set" / "images" / "a").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "set" / "images" / "a" / f"{i}.png")
    (tmp_path / "set" / "images" / "a" / "3.png").write_bytes(b"bad")
    flags = "masks", "--ckpt", path, "--data_path", tmp_path / "set" / "images", "--image_size", 64, "--mass", 0.4
    assert exit_message(run, *flags).endswith("masks of any images need --write DIR")
    by_hand = tmp_path / "hand" / "a" / "1.png"
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(b"drawn by hand")
    assert f"{by_hand} was not written by this command" in exit_message(run, *flags, "--write", tmp_path / "hand")
    assert by_hand.read_bytes() == b"drawn by hand" and not (tmp_path / "hand" / "boxes.json").exists()
    theirs = '{"info": {"year": 2017}, "images": [], "annotations": [], "categories": [{"id": 1, "name": "object"}]}'
    (tmp_path / "hand" / "boxes.json").write_text(theirs)
    for _ in range(2):  # beside a mask and alone
        assert f"{tmp_path / 'hand' / 'boxes.json'} was not written by this command" in exit_message(
            run, *flags, "--write", tmp_path / "hand")
        assert (tmp_path / "hand" / "boxes.json").read_text() == theirs
        by_hand.unlink(missing_ok=True)
    by_hand.write_bytes(b"drawn by hand")
    (tmp_path / "hand" / "boxes.json").unlink()
    run(*flags, "--write", tmp_path / "hand", "--num_images", 1)  # a/0.png
    for _ in range(2):
        assert f"{by_hand} was not written by this command" in exit_message(run, *flags, "--write", tmp_path / "hand")
    assert by_hand.read_bytes() == b"drawn by hand"
    by_hand.unlink()
    assert "skipped 1 of 4" in exit_message(run, *flags, "--write", tmp_path / "hand")
    run(*flags, "--write", tmp_path / "hand", "--num_images", 1)
    for _ in range(2):  # masks of earlier runs are still its own
        assert "skipped 1 of 4" in exit_message(run, *flags, "--write", tmp_path / "hand")
    for _ in range(2):  # the folder is its own
        line = exit_message(run, *flags, "--write", tmp_path / "set" / "masks")
        assert "skipped 1 of 4 images; the first: " in line
    assert not list(path.parent.glob("*masks*"))  # nothing to compare with
    coco = json.loads((tmp_path / "set" / "masks" / "boxes.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == ["a/0.png", "a/1.png", "a/2.png"]
    assert {(image["width"], image["height"]) for image in coco["images"]} == {(48, 40)}
    assert [row["id"] for row in coco["annotations"]] == [*range(1, 1 + len(coco["annotations"]))]
    assert coco["categories"] == [{"id": 1, "name": "object"}] and len(coco["annotations"]) > 3
    for image in coco["images"]:
        with Image.open(tmp_path / "set" / "masks" / image["file_name"]) as written:
            assert written.mode == "P" and written.getpalette()[3:6] == list(COLORS[0])
            mask = np.asarray(written)
        photo = Image.open(tmp_path / "set" / "images" / image["file_name"])
        assert jaccard_of_attention(network, photo, [mask > 0], 64, 0.4)[4, 0] == 1 and mask.max() == 1
        boxes = [row for row in coco["annotations"] if row["image_id"] == image["id"]]
        left = mask.copy()
        for (x, y, w, h), area in sorted(((row["bbox"], row["area"]) for row in boxes), key=lambda item: item[1]):
            part = left[y:y + h, x:x + w]
            assert part.any(axis=0).all() and part.any(axis=1).all() and area <= part.sum()
        assert sum(row["area"] for row in boxes) == mask.sum() and all(row["iscrowd"] == 0 for row in boxes)
    data = open_semantic(str(tmp_path / "set"))
    assert data.train.classes == ["0", "1"] and len(data.train) == 3
    for name in ("images", "images/masks", "masks/../images/new/masks"):
        assert f"--write {tmp_path / 'set' / name}: masks would be written among the images" in exit_parsing(
            capsys, *flags, "--write", tmp_path / "set" / name)
    (tmp_path / "set" / "images" / "a" / "0.jpg").write_bytes(b"")
    assert "the masks of a/0.jpg and a/0.png would be one file" in exit_message(run, *flags, "--write", tmp_path / "w")


def exit_parsing(capsys, *argv):
    """The line with which wrong flags end."""
    with pytest.raises(SystemExit):
        run(*argv)
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_masks_are_written_beside_the_evaluation(model, tmp_path, capsys, monkeypatch):
    """The attention of each image is computed once for each of the two models."""
    flags = "masks", "--ckpt", model[1], "--num_images", 3, "--image_size", 64
    run(*flags)
    path, = model[1].parent.glob("teacher.masks.*.json")
    before = json.loads(path.read_text())["jaccard"]
    forward, calls = VisionTransformer.forward_with_attention, []
    monkeypatch.setattr(VisionTransformer, "forward_with_attention", lambda self, x: (
        calls.append(self), forward(self, x))[1])
    run(*flags, "--write", tmp_path / "out")
    assert len(calls) == 6 and len(set(map(id, calls))) == 2
    assert json.loads(path.read_text())["jaccard"] == before
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "00000.png", "00666.png", "01333.png", "boxes.json"]
    assert "wrote 3 masks and " in capsys.readouterr().out


@pytest.mark.parametrize("task", ["masks", "discover"])
def test_gray_of_16_bits_is_scaled_as_in_training(model, tmp_path, task):
    """By the black and white of the model: as the same images of 8 bits."""
    network, path = model
    for i in range(2):
        image, mask = Shapes("test", 2000, 64).render(i)
        gray = np.asarray(image.convert("L")) // 2  # so that the values used are half of the range
        for folder, pixels in (("deep", gray.astype(np.uint16) * 16), ("flat", gray)):
            for kind, array in (("images", pixels), ("masks", mask.numpy().astype(np.uint8))):
                (tmp_path / folder / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(tmp_path / folder / kind / f"{i}.png")
    results = []
    for folder, value_range in (("deep", (0.0, 4080.0)), ("flat", None), ("deep", None)):
        ckpt = tmp_path / "models" / f"{folder}{bool(value_range)}.safetensors"
        ckpt.parent.mkdir(exist_ok=True)
        save_model(str(ckpt), load_file(path), load_backbone(str(path))[1] | dict(value_range=value_range))
        run(task, "--ckpt", ckpt, "--data_path", tmp_path / folder, "--output_dir", tmp_path / ckpt.stem)
        result = json.loads(next((tmp_path / ckpt.stem).glob("*.json")).read_text())
        results.append(result["jaccard"] if task == "masks" else result["objects"])
    assert results[0] == results[1] != results[2]
    for folder, value_range in (("deep", (0, 4080)), ("flat", None)):
        data = open_semantic(str(tmp_path / folder), value_range)
        results.append([np.asarray(data.train[i][0][0]) for i in range(2)])
        frame = tmp_path / folder / "images" / "0.png"
        results.append(segment.read_frame(frame, (64, 64), 64, 64, ([0] * 3, [1] * 3), value_range).numpy())
    assert np.array_equal(results[3], results[5]) and np.array_equal(results[4], results[6])


# ---- discovery ----

@pytest.fixture
def voc2007(tmp_path):
    """Eight images of 61 x 50 pixels and larger with the true boxes of a disc, in the layout of VOC2007."""
    root, rng = tmp_path / "VOC2007", np.random.default_rng(0)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for i in range(8):
        left, top, side = *rng.integers(2, 20, 2), 22
        pixels = rng.integers(90, 120, (50, 61 + i, 3)).astype(np.uint8)
        pixels[top:top + side, left:left + side] = (200, 30, 40)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{i}.jpg", quality=95)
        box = dict(xmin=left + 1, ymin=top + 1, xmax=left + side, ymax=top + side)
        text = "".join(f"<{name}>{value}</{name}>" for name, value in box.items())
        (root / "Annotations" / f"{i}.xml").write_text(
            f"<annotation><object><bndbox>{text}</bndbox></object></annotation>")
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("".join(f"{i}\n" for i in range(8)))
    return root


def boxes_by_definition(network, root, method, size):
    """[(box, IoU)] of the images of VOC2007: pixels of the patches found, by way of the dense definitions."""
    result = []
    for i in range(8):
        x = TF.to_tensor(Image.open(root / "JPEGImages" / f"{i}.jpg"))
        _, H, W = x.shape
        rows, cols = (-(-side // 8) if not size else round(side * size / min(H, W) / 8) for side in (H, W))
        if size:
            x = F.interpolate(x[None], (rows * 8, cols * 8), mode="bicubic", antialias=True)[0]
        x = TF.normalize(x, IMAGENET_MEAN, IMAGENET_STD)
        padded = torch.zeros(1, 3, rows * 8, cols * 8)
        padded[0, :, :x.shape[1], :x.shape[2]] = x
        with torch.no_grad():
            last = network.blocks[-1]
            tokens = last.norm1(network.run_to_last_block(padded))
            keys = last.attn.qkv(tokens)[0, 1:, 32:64].view(rows, cols, 32).numpy()
        mask = (lost_by_definition(keys, 100) if method == "lost" else tokencut_by_definition(keys, 0.2, 1e-5))[0]
        scale = (H / rows, W / cols) if size else (8, 8)
        found = [(y, x) for y in range(H) for x in range(W)
                 if mask[int((y + 0.5) / scale[0]), int((x + 0.5) / scale[1])]]
        top, left = map(min, zip(*found))
        bottom, right = (1 + max(values) for values in zip(*found))
        text = (root / "Annotations" / f"{i}.xml").read_text()
        x0, y0, x1, y1 = (int(text.split(f"<{name}>")[1].split("<")[0]) for name in ("xmin", "ymin", "xmax", "ymax"))
        inside = max(0, min(right, x1) - max(left, x0 - 1)) * max(0, min(bottom, y1) - max(top, y0 - 1))
        union = (right - left) * (bottom - top) + (x1 - x0 + 1) * (y1 - y0 + 1) - inside
        result.append(([left, top, right, bottom], inside / union))
    return result


@pytest.mark.parametrize("method, size", [("lost", 96), ("tokencut", 96), ("tokencut", 0)])
def test_discovery_equals_the_definition(model, voc2007, capsys, tmp_path, method, size):
    """At the size of the flag, and at the image's own, padded with zeros as published; IoU from the XML files."""
    network, path = model
    run("discover", "--ckpt", path, "--data_path", voc2007, "--method", method, "--image_size", size, "--write",
        tmp_path / "out")
    result = json.loads((path.parent / f"teacher.{method}.VOC2007.json").read_text())
    expected = boxes_by_definition(network, voc2007, method, size)
    for i, (row, (box, iou)) in enumerate(zip(result["objects"], expected)):
        assert row == dict(file=f"JPEGImages/{i}.jpg", box=box, iou=pytest.approx(iou, abs=1e-6))
        mask = np.asarray(Image.open(tmp_path / "out" / "JPEGImages" / f"{i}.png"))
        ys, xs = np.nonzero(mask)
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == box and mask.shape == (50, 61 + i)
    corloc = 100 * np.mean([iou >= 0.5 for _, iou in expected])
    assert result["corloc"] == corloc and result["num_images"] == 8
    assert f"{method}: 8 images, CorLoc {corloc:.1f} on 8 with objects" in capsys.readouterr().out
    coco = json.loads((tmp_path / "out" / "boxes.json").read_text())
    assert [row["bbox"] for row in coco["annotations"]] == [
        [left, top, right - left, bottom - top] for (left, top, right, bottom), _ in expected]
    with Image.open(path.parent / f"teacher.{method}.VOC2007.png") as drawn:
        colors = np.asarray(drawn.convert("RGB")).reshape(-1, 3)
    assert (colors == COLORS[0]).all(axis=1).sum() > 100


def test_objects_of_masks_and_of_any_images(model, tmp_path, capsys, exit_message):
    """CorLoc with the boxes of the connected parts of the built-in masks; without masks there is none."""
    _, path = model
    run("discover", "--ckpt", path, "--num_images", 6, "--method", "lost")
    result = json.loads((path.parent / "teacher.lost.shapes.json").read_text())
    assert result["image_size"] == 72 and result["num_images"] == 6
    for row in result["objects"]:
        mask = Shapes("test", 2000, 32).render(int(row["file"][:5]))[1].numpy()
        best, (left, top, right, bottom) = 0.0, row["box"]
        while mask.any():
            part = flood(mask, tuple(np.argwhere(mask)[0]))
            (y0, x0), (y1, x1) = np.argwhere(part).min(axis=0), np.argwhere(part).max(axis=0) + 1
            inside = max(0, min(right, x1) - max(left, x0)) * max(0, min(bottom, y1) - max(top, y0))
            best = max(best, inside / ((right - left) * (bottom - top) + (x1 - x0) * (y1 - y0) - inside))
            mask = mask & ~part
        assert row["iou"] == pytest.approx(best, abs=1e-6)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Shapes("test", 3, 32)[i][0].save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "photos" / "1.png").write_bytes(b"bad")
    line = exit_message(run, "discover", "--ckpt", path, "--data_path", tmp_path / "photos")
    assert "skipped 1 of 3 images; the first: " in line and "1.png" in line
    result = json.loads((path.parent / "teacher.tokencut.photos.json").read_text())
    assert result["corloc"] is None and [row["iou"] for row in result["objects"]] == [None, None]
    for flags, message in ((["--data_path", tmp_path / "nothing"], "nothing: no such folder, or no image found"),
                           (["--image_size", 8], "--image_size 8 is less than two patches of 8 pixels")):
        assert message in exit_message(run, "discover", "--ckpt", path, *flags)


def test_patches_smaller_than_pixels_have_a_box(model, tmp_path):
    """Of images with fewer pixels than patches; and true boxes too small to be drawn are drawn."""
    run("discover", "--ckpt", model[1], "--num_images", 12, "--image_size", 480, "--method", "lost")
    objects = json.loads((model[1].parent / "teacher.lost.shapes.json").read_text())["objects"]
    assert all(0 <= left < right <= 32 and 0 <= top < bottom <= 32 for left, top, right, bottom in
               (row["box"] for row in objects)) and len(objects) == 12
    for grid, size in (((60, 60), (32, 32)), ((5, 7), (50, 61)), ((4, 4), (32, 32))):
        boxes = torch.tensor([[x, y, x + 1, y + 1] for y in range(grid[0]) for x in range(grid[1])])
        for box, (left, top, right, bottom) in zip(boxes, segment.boxes_of_pixels(boxes, grid, size).tolist()):
            mask = torch.zeros(1, *grid)
            mask[0, box[1], box[0]] = 1
            ys, xs = np.nonzero(segment.resize_masks(mask, size)[0].numpy())
            if len(ys):
                assert [left, top, right, bottom] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert 0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]
    image, mask = torch.zeros(3, 400, 500), torch.zeros(400, 500, dtype=torch.bool)
    drawn = segment.draw_boxes(image, mask, torch.tensor([[0, 0, 9, 9]]), torch.tensor([[101.0, 100, 102, 101]]), 242)
    assert drawn.getpixel((49, 48)) == (255, 255, 255)


def test_frames_without_a_mask_do_not_count(tmp_path):
    frames = [tmp_path / "JPEGImages" / "480p" / "a" / f"{i}.jpg" for i in range(5)]
    disc = np.zeros((20, 30), np.uint8)
    disc[5:15, 5:15] = 1
    for i in (0, 2, 4):
        path = segment.mask_path(frames[i])
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(disc).save(path)
    half = disc.copy()
    half[:, 10:] = 0  # the last frame does not count, whether or not it has a mask
    scores = segment.evaluate_objects(dict(zip(frames[1:], (disc, half, disc, disc))), [1], (30, 20))
    assert scores["1"]["J"]["mean"] == pytest.approx(0.5)
    segment.mask_path(frames[4]).unlink()
    scores = segment.evaluate_objects(dict(zip(frames[1:], (disc, half, disc, disc))), [1], (30, 20))
    assert scores["1"]["J"]["mean"] == pytest.approx(0.5)


def test_an_image_of_two_patches_has_an_object(model, tmp_path):
    """In its own size, as published: the first patch, unless both are alike."""
    (tmp_path / "small").mkdir()
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    Image.fromarray(pixels).save(tmp_path / "small" / "a.png")
    run("discover", "--ckpt", model[1], "--data_path", tmp_path / "small", "--image_size", 0)
    result = json.loads((model[1].parent / "teacher.tokencut.small.json").read_text())
    assert result["objects"][0]["box"] in ([0, 0, 8, 8], [0, 0, 16, 8])


def test_images_of_too_many_patches_are_skipped(model, voc2007, exit_message):
    Image.new("RGB", (1300, 1290)).save(voc2007 / "JPEGImages" / "3.jpg")  # 163 x 162 patches
    line = exit_message(run, "discover", "--ckpt", model[1], "--data_path", voc2007, "--image_size", 0)
    assert line.endswith("skipped 1 of 8 images; the first: JPEGImages/3.jpg: 26,406 patches are more than 20,000, set "
                         "a smaller --image_size")
    assert json.loads((model[1].parent / "teacher.tokencut.VOC2007.json").read_text())["num_images"] == 7
    line = exit_message(run, "discover", "--ckpt", model[1], "--data_path", voc2007, "--image_size", 999_999)
    # 50 x 68 pixels: 125,000 x 170,000 patches, before anything of that size is made
    assert "none of its images can be used; the last: JPEGImages/7.jpg: 21,250,000,000 patches are more than" in line


def test_discovery_under_two_processes_equals_one(model, voc2007, tmp_path, run_torchrun):
    (voc2007 / "JPEGImages" / "2.jpg").write_bytes(b"bad")
    results = []
    for processes in (1, 2):
        argv = ["discover", "--ckpt", str(model[1]), "--data_path", str(voc2007), "--image_size", "64", "--num_workers",
                "0", "--device", "cpu", "--write", str(tmp_path / "masks"), "--output_dir", str(tmp_path / "out")]
        script = f"import segment\ntry: segment.main(segment.parse_args({argv}))\nexcept segment.DataError: pass"
        if processes == 1:
            exec(script, {})
        else:
            run_torchrun(processes, script)
        files = sorted(file for folder in ("masks", "out") for file in (tmp_path / folder).rglob("*.*"))
        results.append({file: file.read_bytes() for file in files})
        for file in files:
            file.unlink()
    assert results[0] == results[1] and len(results[0]) == 7 + 3


# ---- video ----

def propagate_by_definition(network, davis, name, shorter, cols, rows):
    """Masks of a sequence by the definition, object indices [T-1, H, W]."""
    paths = sorted((davis / "JPEGImages" / "480p" / name).glob("*.jpg"))
    first = np.array(Image.open(davis / "Annotations" / "480p" / name / "00000.png"))
    first[first == 255] = 255 * (name == "single")
    numbers = np.unique(first)
    small = np.asarray(Image.fromarray(first).resize((cols, rows), Image.Resampling.NEAREST))
    known = [torch.from_numpy(np.stack([small == number for number in numbers])).double()]
    frames, result = [], []
    for path in paths:
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float()
        pixels = F.interpolate(pixels, size=(rows * 8, cols * 8), mode="bilinear").round() / 255
        with torch.no_grad():
            tokens = network.get_intermediate_layers(TF.normalize(pixels, IMAGENET_MEAN, IMAGENET_STD))[0][0, 1:]
        frames.append(F.normalize(tokens.double(), dim=-1).view(rows, cols, -1))
        if len(frames) == 1:
            continue
        context = [0, *range(max(1, len(frames) - 1 - 2), len(frames) - 1)]  # the first and the last two
        labels = by_definition(frames[-1], torch.stack([frames[i] for i in context]),
                               torch.stack([known[i] for i in context]), 3, 4, 0.3)
        known.append(labels)
        large = F.interpolate(labels[None], scale_factor=8, mode="bilinear")[0].numpy()
        for c in range(len(large)):
            if large[c].max() > 0:
                large[c] -= large[c].min()
                large[c] /= large[c].max()
        mask = Image.fromarray(large.argmax(axis=0).astype(np.uint8)).resize((150, 100), Image.Resampling.NEAREST)
        result.append(numbers[np.asarray(mask)])
    return np.stack(result)


def test_video_equals_the_definition(model, davis, capsys):
    network, path = model
    run("video", "--ckpt", path, "--data_path", davis, "--image_size", 96, "--n_last_frames", 2, "--topk", 3,
        "--size_mask_neighborhood", 4, "--temperature", 0.3)
    output = path.with_suffix(".video.DAVIS")
    result = json.loads((output / "result.json").read_text())
    assert list(result["sequences"]) == ["pair", "single"]
    lines = capsys.readouterr().out
    for name, numbers in (("pair", [1, 2]), ("single", [255])):  # 3 was not in the first frame
        expected = propagate_by_definition(network, davis, name, 96, 16, 12)  # 100 x 150 pixels -> 96 x 144 -> 96 x 128
        masks = [Image.open(output / name / f"{t:05}.png") for t in range(6)]
        assert {mask.mode for mask in masks} == {"P"}
        found = np.stack([np.asarray(mask) for mask in masks])
        truth = np.stack([np.asarray(Image.open(davis / "Annotations" / "480p" / name / f"{t:05}.png"))
                          for t in range(6)])
        truth = np.where((truth == 255) & (name == "pair"), 0, truth)
        assert (found[0] == truth[0]).all() and (found[1:] == expected).mean() > 0.9999
        assert list(result["sequences"][name]) == [str(number) for number in numbers]  # also the one that leaves
        for number in numbers:
            pairs = [(found[t] == number, truth[t] == number) for t in range(1, 5)]  # neither first nor last
            J = [(a & b).sum() / (a | b).sum() if (a | b).any() else 1 for a, b in pairs]
            contour = [f_by_definition(*map(torch.from_numpy, pair), 0.008) for pair in pairs]
            score = result["sequences"][name][str(number)]
            assert score["J"]["mean"] == pytest.approx(np.mean(J))
            assert score["F"]["mean"] == pytest.approx(np.mean(contour))
            assert score["J"]["recall"] == np.mean(np.array(J) > 0.5)
    assert masks[0].convert("RGB").getpixel((20, 25)) == (255, 255, 255)
    means = [100 * np.mean([score[of]["mean"] for by in result["sequences"].values() for score in by.values()])
             for of in "JF"]
    assert f"sequences 2, objects 3: J&F {sum(means) / 2:.1f}, J {means[0]:.1f}" in lines


@pytest.fixture
def segmented(monkeypatch):
    """A function: names of the sequences segmented since its last call; and a list of names to interrupt at."""
    segment_sequence, names, interrupt = segment.segment_sequence, [], []

    def record(model, frames, folder, args):
        names.append(folder.name)
        if folder.name in interrupt:
            raise KeyboardInterrupt
        return segment_sequence(model, frames, folder, args)
    monkeypatch.setattr(segment, "segment_sequence", record)
    return lambda: [names.pop(0) for _ in range(len(names))], interrupt


def test_video_resumes_under_the_same_flags(model, davis, capsys, segmented):
    names, _ = segmented
    flags = "video", "--ckpt", model[1], "--data_path", davis, "--image_size", 64
    run(*flags, "--sequences", "pair")
    output = model[1].with_suffix(".video.DAVIS")
    before = (output / "pair" / "00003.png").stat().st_mtime_ns
    (output / "single").mkdir()
    run(*flags)
    assert names() == ["pair", "single"] and "sequences 2, objects 3" in capsys.readouterr().out
    assert (output / "pair" / "00003.png").stat().st_mtime_ns == before and (output / "single" / "00005.png").exists()
    for other in (["--topk", 2], ["--precision", "bf16"], ["--untrained"]):
        run(*flags, *other, "--output_dir", output)
        assert names() == ["pair", "single"]
        run(*flags, *other, "--output_dir", output)
        assert names() == []
    for text in ('{"sequences": {"pair": 5}}', '{"sequences": {"pa'):
        (output / "result.json").write_text(text)
        run(*flags)
        assert names() == ["pair", "single"]


def test_video_keeps_finished_sequences(model, davis, segmented):
    names, interrupt = segmented
    interrupt.append("single")
    flags, path = ("--data_path", davis, "--image_size", 64), model[1]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run("video", "--ckpt", path, *flags)
    assert names() == ["pair", "single", "single"]
    moved = path.with_name("moved.safetensors")
    path.rename(moved)  # the same weights
    flags += "--ckpt", moved, "--output_dir", path.with_suffix(".video.DAVIS")
    interrupt.clear()
    run("video", *flags, "--sequences", "single")
    run("video", *flags)
    assert names() == ["single"]
    interrupt.append("single")
    with pytest.raises(KeyboardInterrupt):  # other flags: the masks in the folder are outdated
        run("video", *flags, "--topk", 2, "--sequences", "single")
    assert json.loads((path.with_suffix(".video.DAVIS") / "result.json").read_text())["sequences"] == {}


def test_corrupt_sequences_are_skipped(model, davis, exit_message):
    _, path = model
    frames, masks = davis / "JPEGImages" / "480p", davis / "Annotations" / "480p"
    for name in ("a_cut", "b_unmasked", "c_small_mask", "d_other_mask", "e_nothing"):
        (frames / name).mkdir()
        (masks / name).mkdir()
        for t in range(6):
            (frames / name / f"{t:05}.jpg").write_bytes((frames / "pair" / f"{t:05}.jpg").read_bytes())
        (masks / name / "00000.png").write_bytes((masks / "pair" / "00000.png").read_bytes())
    Image.new("RGB", (150, 90)).save(frames / "a_cut" / "00003.jpg")
    (masks / "b_unmasked" / "00000.png").unlink()
    Image.new("L", (15, 10)).save(masks / "c_small_mask" / "00000.png")
    Image.new("L", (15, 10)).save(masks / "d_other_mask" / "00002.png")
    (masks / "d_other_mask" / "00003.png").write_bytes((masks / "pair" / "00003.png").read_bytes())
    Image.new("L", (150, 100)).save(masks / "e_nothing" / "00000.png")
    line = exit_message(run, "video", "--ckpt", path, "--data_path", davis, "--image_size", 64)
    assert "skipped 5 of 7 sequences; the first: " in line
    assert line.endswith("00003.jpg: 150 x 90 pixels, the first frame 150 x 100")
    output = path.with_suffix(".video.DAVIS")
    assert list(json.loads((output / "result.json").read_text())["sequences"]) == ["pair", "single"]
    assert sorted(x.name for x in (output / "a_cut").iterdir()) == [f"{t:05}.png" for t in range(3)]
    assert not any((output / name).exists() for name in ("b_unmasked", "c_small_mask", "e_nothing"))
    assert (output / "d_other_mask" / "00005.png").exists()  # only its evaluation failed


@pytest.mark.parametrize("folder", ["Annotations/480p", "JPEGImages/480p/out"])
def test_outputs_are_not_written_among_the_data(model, davis, exit_message, folder):
    files = {path: path.read_bytes() for path in davis.rglob("*.*")}
    flags = "--ckpt", model[1], "--data_path", davis, "--image_size", 64, "--output_dir"
    assert "choose another --output_dir" in exit_message(run, "video", *flags, davis / folder)
    for task in ("masks", "discover"):
        assert "outputs would be written among the images" in exit_message(run, task, *flags, davis)
    assert {path: path.read_bytes() for path in davis.rglob("*.*")} == files


def test_video_without_ground_truth(model, davis, capsys):
    _, path = model
    for mask in (davis / "Annotations" / "480p" / "pair").glob("0000[1-5].png"):
        mask.unlink()
    listed = davis / "ImageSets" / "2017" / "val.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("pair\n")
    run("video", "--ckpt", path, "--data_path", davis, "--image_size", 64, "--precision", "bf16", "--output_dir",
        davis / "out")
    out = capsys.readouterr().out
    assert "pair: no ground truth between the first and the last frame" in out
    assert "sequences 1, objects 0" in out
    assert len(list((davis / "out" / "pair").iterdir())) == 6 and not (davis / "out" / "single").exists()


def test_overlays_show_the_objects(model, davis):
    run("video", "--ckpt", model[1], "--data_path", davis, "--image_size", 64, "--sequences", "pair")
    output = model[1].with_suffix(".video.DAVIS")
    assert [path.name for path in sorted((output / "pair.overlay").iterdir())] == [f"{t:05}.jpg" for t in range(6)]
    for t in range(6):
        frame = np.asarray(Image.open(davis / "JPEGImages" / "480p" / "pair" / f"{t:05}.jpg"), float)
        mask = np.asarray(Image.open(output / "pair" / f"{t:05}.png"))
        drawn = np.asarray(Image.open(output / "pair.overlay" / f"{t:05}.jpg"), float)
        expected = frame.copy()
        for index in (1, 2, 3):
            expected[mask == index] = 0.6 * frame[mask == index] + 0.4 * np.array(COLORS[index - 1])
        inside = np.asarray(Image.fromarray(mask).filter(ImageFilter.MinFilter(9))) == np.asarray(
            Image.fromarray(mask).filter(ImageFilter.MaxFilter(9)))  # away from outlines
        assert inside.any() and np.abs(drawn - expected)[inside].mean() < 12  # of a JPEG of noise
        change = np.abs(drawn - frame).mean(axis=-1)
        assert change[inside & (mask == 0)].mean() < 12 < change[inside & (mask > 0)].mean()
        for index in np.unique(mask[inside]):  # each in its color
            assert np.abs((drawn - expected)[inside & (mask == index)].mean(axis=0)).max() < 10


def test_precision_of_patch_features(model):
    image = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    tokens = {precision: segment.extract_patch_features(model[0], image, Namespace(device="cpu", precision=precision))
              for precision in ("fp32", "bf16")}
    with torch.no_grad():
        exact = model[0].double().get_intermediate_layers(image.double())[0][0, 1:].view(4, 6, 32)
    errors = {precision: ((x - exact).norm() / exact.norm()).item() for precision, x in tokens.items()}
    assert errors["fp32"] < 1e-5 and 1e-4 < errors["bf16"] < 5e-2


def test_torchrun_is_an_error(model, davis, exit_message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in exit_message(run, "video", "--ckpt", model[1], "--data_path", davis)


@pytest.mark.parametrize("width, height, shorter, p, expected", [
    (854, 480, 480, 16, (30, 52)), (854, 480, 480, 8, (60, 104)), (480, 854, 480, 16, (52, 30)),
    (1920, 1080, 480, 16, (30, 52)), (480, 480, 480, 16, (30, 28)), (854, 480, 490, 14, (35, 62)),
    (50, 50, 60, 8, (7, 8))])  # at least 64 pixels
def test_grid_equals_the_released_one(width, height, shorter, p, expected):
    assert segment.compute_grid(width, height, shorter, p) == expected
