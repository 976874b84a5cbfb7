import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from sklearn.metrics import auc, precision_recall_curve
from torchvision.transforms import functional as TF

import retrieve
from augment import IMAGENET_MEAN, IMAGENET_STD
from common.weights import save_model
from data.datasets import ImageFolder
from data.loaders import center_crop_view
from data.shapes import Shapes
from evaluation.descriptor import cls_and_gem_features, fit_whitening


def save_shape(path, i, size=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    Shapes("test", 2000, size)[i][0].save(path, quality=95)


def run(*argv):
    retrieve.main(retrieve.parse_args([str(x) for x in argv] + ["--num_workers", "0", "--device", "cpu"]))


def normalize(image):
    return TF.normalize(TF.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)[None]


def mean_ap(similarity, positives):
    """Mean area under the precision-recall curves of scikit-learn, percent."""
    aps = []
    for scores, right in zip(similarity.numpy(), positives):
        precision, recall, _ = precision_recall_curve(np.isin(np.arange(len(scores)), right), scores)
        aps.append(auc(recall, precision) if (scores > scores[right]).sum() < 20 else 0.0)  # only the first 20 count
    return 100 * np.mean(aps)


# ---- copies ----

def strong_edits(image):
    """(Image, JPEG quality) of four edits."""
    w, h = image.size
    covered = image.copy()
    covered.paste((255, 255, 0), (w // 2, h // 2, w, h))
    covered.paste((0, 0, 0), (w // 8, h // 8, w // 3, h // 5))
    return [(image.crop((w // 4, h // 4, w // 4 + w // 2, h // 4 + h // 2)), 75),
            (image.filter(ImageFilter.GaussianBlur(max(w, h) / 40)), 75), (covered, 75), (image, 5)]


def make_copydays(root, images):
    """Originals, strong copies and JPEGs of quality 5, in the layout of Copydays."""
    for folder in ("original", "strong", "jpegqual/5"):
        (root / folder).mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(root / "original" / f"{2000 + i}00.jpg", quality=95)
        image.save(root / "jpegqual" / "5" / f"{2000 + i}00.jpg", quality=5)
        for n, (copy, quality) in enumerate(strong_edits(image), start=1):
            copy.save(root / "strong" / f"{2000 + i}{n:02}.jpg", quality=quality)


@pytest.fixture
def copydays(tmp_path, request):
    """Copies of 12 images, and 50 others beside them; real ones with --images."""
    real = request.config.getoption("--images")
    images = ImageFolder(real) if real else Shapes("test", 62, 64)
    images = [images[i][0] for i in range(62)]
    make_copydays(tmp_path / "copydays", images[:12])
    (tmp_path / "others").mkdir()
    for i, image in enumerate(images[12:]):
        image.save(tmp_path / "others" / f"{i:02}.png")
    return tmp_path / "copydays"


@pytest.mark.parametrize("whitening", [False, True])
@torch.no_grad()
def test_copies_equal_the_protocol(model, copydays, capsys, whitening):
    network, path = model
    others = copydays.parent / "others"
    run("copies", "--ckpt", path, "--data_path", copydays, "--image_size", 48, "--distractors", others,
        "--batch_size_per_gpu", 7, *["--whitening", others] * whitening)
    result = json.loads(path.with_suffix(".copies.copydays.json").read_text())

    def features(folder):
        images = [Image.open(file).convert("RGB").resize((48, 48), Image.Resampling.BICUBIC)
                  for file in sorted(folder.iterdir())]
        return cls_and_gem_features(network, torch.cat([normalize(image) for image in images]))
    database, strong, jpeg = (features(copydays / name) for name in ("original", "strong", "jpegqual/5"))
    distractors = features(others)
    white = fit_whitening(distractors) if whitening else lambda x: x
    database = F.normalize(white(torch.cat((database, distractors))), dim=1)
    strong, jpeg = (F.normalize(white(x), dim=1) @ database.T for x in (strong, jpeg))
    assert result["mAP"]["strong"] == pytest.approx(mean_ap(strong, [i // 4 for i in range(48)]))
    assert result["mAP"]["jpegqual/5"] == pytest.approx(mean_ap(jpeg, range(12)))
    assert result["num_images"] == 62 and list(result["mAP"]) == ["strong", "jpegqual/5"]
    out = capsys.readouterr().out
    assert f"strong          48 queries  {result['mAP']['strong']:5.1f}" in out
    assert ("whitening may do harm" in out) == whitening  # 50 images, 64 features
    assert f"distractors: 50 images of {others}, 0 corrupt" in out


def test_a_corrupt_copy_is_an_error(model, copydays, exit_message):
    (copydays / "strong" / "200301.jpg").write_bytes(b"bad")
    line = exit_message(run, "copies", "--ckpt", model[1], "--data_path", copydays, "--image_size", 48)
    assert "1 of 48 images cannot be read; the first: " in line and "200301.jpg" in line


# ---- landmarks ----

@pytest.fixture
def oxford(tmp_path):
    """Ten images of 90 x 61, three queries, ground truth as published."""
    root = tmp_path / "roxford5k"
    for i in range(13):
        path = root / "jpg" / f"p{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Shapes("test", 2000, 96)[i][0].crop((3, 5, 93, 66)).save(path, quality=95)
    none = np.array([], dtype=int)
    gnd = [dict(bbx=[10.2, 5.0, 70.0, 50.7], easy=np.array([1, 2]), hard=np.array([5]), junk=np.array([0, 7])),
           dict(bbx=[0.0, 0.0, 90.0, 61.0], easy=none, hard=np.array([3, 4]), junk=none),
           dict(bbx=[5.0, 5.0, 60.0, 60.0], easy=np.array([8]), hard=none, junk=np.array([9]))]
    truth = dict(gnd=gnd, imlist=[f"p{i}" for i in range(10)], qimlist=["p10", "p11", "p12"])
    (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth, protocol=2))
    return root, truth


@pytest.mark.parametrize("crop", [False, True])
@torch.no_grad()
def test_landmarks_equal_the_protocol(model, oxford, capsys, crop):
    network, path = model
    root, truth = oxford
    run("landmarks", "--ckpt", path, "--data_path", root.parent, "--image_size", 64, *["--crop_queries"] * crop)
    file, = path.parent.glob("teacher.landmarks.*.json")
    result = json.loads(file.read_text())["result"]["roxford5k/gnd_roxford5k.pkl"]

    def feature(name, box=None):
        image = Image.open(root / "jpg" / f"{name}.jpg").convert("RGB")
        image = image.crop([round(side) for side in box]) if box else image
        image.thumbnail((64, 64), Image.Resampling.LANCZOS)
        x, total = normalize(image), 0
        for scale in (1, 2 ** -0.5, 0.5):
            y = x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bilinear")
            total = total + network(y[..., :y.shape[-2] // 8 * 8, :y.shape[-1] // 8 * 8])
        return F.normalize(total)[0]
    database = torch.stack([feature(name) for name in truth["imlist"]])
    queries = torch.stack([feature(name, answer["bbx"] if crop else None)
                           for name, answer in zip(truth["qimlist"], truth["gnd"])])
    similarity = queries @ database.T
    for level, (wanted, ignored) in dict(easy=(["easy"], ["hard", "junk"]), medium=(["easy", "hard"], ["junk"]),
                                       hard=(["hard"], ["easy", "junk"])).items():
        aps, first = [], []
        for scores, answer in zip(similarity, truth["gnd"]):
            kept = [i for i in range(10) if not any(i in answer[name] for name in ignored)]
            positives = [any(i in answer[name] for name in wanted) for i in kept]
            if any(positives):
                precision, recall, _ = precision_recall_curve(positives, scores[kept].numpy())
                aps.append(auc(recall, precision))
                right_first = np.array(positives)[scores[kept].argsort(descending=True).numpy()]
                last = right_first.nonzero()[0][-1] + 1
                first.append([right_first[:min(k, last)].mean() for k in (1, 5, 10)])
        assert result[level]["mAP"] == pytest.approx(100 * np.mean(aps))
        assert [result[level][f"mP@{k}"] for k in (1, 5, 10)] == pytest.approx(100 * np.mean(first, axis=0))
    assert f"medium    mAP {result['medium']['mAP']:5.1f}  mP@1" in capsys.readouterr().out


def test_scales_and_whitening_change_the_result(model, oxford, tmp_path):
    _, path = model
    root, _ = oxford
    for i in range(40):
        save_shape(tmp_path / "others" / f"{i}.png", i)
    for flags in ([], ["--multiscale", "false"], ["--whitening", tmp_path / "others"], []):  # the last writes the first
        run("landmarks", "--ckpt", path, "--data_path", root, "--image_size", 64, *flags)
    assert len(list(path.parent.glob("*.json"))) == 3
    results = [json.loads((path.parent / f"teacher.landmarks.roxford5k{number}.json").read_text())["result"]
               for number in ("", ".2", ".3")]
    assert results[0] != results[1] and results[0] != results[2]


def test_two_benchmarks_share_the_whitening(model, oxford, tmp_path, capsys):
    root, truth = oxford
    shutil.copytree(root, root.parent / "rparis6k")
    save_shape(tmp_path / "others" / "1.png", 1)
    run("landmarks", "--ckpt", model[1], "--data_path", root.parent, "--image_size", 64, "--whitening",
        tmp_path / "others")
    assert capsys.readouterr().out.count("whitening: 1 images of") == 1
    result = json.loads(next(model[1].parent.glob("*.landmarks.*.json")).read_text())["result"]
    assert list(result) == ["roxford5k/gnd_roxford5k.pkl", "rparis6k/gnd_roxford5k.pkl"]


# ---- search ----

@pytest.fixture
def photos(tmp_path):
    for i in range(9):
        save_shape(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png", i)
    return tmp_path / "photos"


@torch.no_grad()
def test_search_returns_the_nearest(model, photos, tmp_path, capsys):
    network, path = model
    save_shape(tmp_path / "query.png", 4)
    run("search", "--ckpt", path, "--data_path", photos, "--nearest", 3, tmp_path / "query.png", photos / "a" / "2.png")
    first, second = capsys.readouterr().out.split(f"{photos / 'a' / '2.png'}:\n")
    files = sorted(photos.rglob("*.png"))
    features = F.normalize(torch.cat([network(center_crop_view(Image.open(file), 32)[None]) for file in files]))
    scores = features @ features[files.index(photos / "a" / "4.png")]
    order = scores.argsort(descending=True)[:3].tolist()
    assert [f"  {scores[i]:6.3f}  {files[i]}" for i in order] == first.splitlines()[-4:-1]
    assert f"   1.000  {photos / 'a' / '4.png'}" in first and str(photos / "a" / "2.png") not in second  # the query
    output = path.with_suffix(".search")
    sheets = [output / "photos" / f"{name}.png.nearest.png" for name in ("query", "2")]
    before = [sheet.read_bytes() for sheet in sheets]
    (tmp_path / "2.png").symlink_to(photos / "b" / "1.png")  # another query of that name
    shutil.copytree(photos, tmp_path / "other" / "data")
    run("search", "--ckpt", path, "--data_path", tmp_path / "other" / "data", "--nearest", 3, tmp_path / "query.png")
    run("search", "--ckpt", path, "--data_path", photos, "--nearest", 3, photos / "a" / "2.png", tmp_path / "2.png")
    assert [sheet.read_bytes() for sheet in sheets] == before
    assert {file.relative_to(output).as_posix() for file in output.rglob("*.png")} == {
        "photos/query.png.nearest.png", "photos/2.png.nearest.png", "photos/2.png.2.nearest.png",
        "data/query.png.nearest.png"}
    capsys.readouterr()
    index = next(output.glob("photos-*.safetensors")).stat().st_mtime_ns
    run("search", "--ckpt", path, "--data_path", photos, tmp_path / "query.png")
    out = capsys.readouterr().out
    assert ": 9 of 9 images indexed" in out and len(list(output.glob("*.safetensors"))) == 2
    assert next(output.glob("photos-*.safetensors")).stat().st_mtime_ns == index
    again = "search", "--ckpt", path, tmp_path / "query.png", "--output_dir", output, "--data_path"
    for flags in (["--untrained"], ["--image_size", 64]):  # each has an index of its own
        run(*again, photos, *flags)
        assert ": 0 of 9 images indexed" in capsys.readouterr().out
    shutil.copytree(photos, tmp_path / "elsewhere" / "photos")
    run(*again, tmp_path / "elsewhere" / "photos")
    assert ": 0 of 9 images indexed" in capsys.readouterr().out
    save_model(path, {f"backbone.{k}": v + 0.01 for k, v in network.state_dict().items()},
               dict(backbone=dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)))
    run(*again, photos)  # other weights under the same name
    assert ": 0 of 9 images indexed" in capsys.readouterr().out


def test_queries_have_the_black_and_white_of_the_folder(model, tmp_path, capsys):
    """Of images of more than 8 bits: a copy of an image finds it, and a new range is a new index."""
    (tmp_path / "deep").mkdir()
    values = np.random.RandomState(0).rand(40, 40)
    for i in range(8):
        Image.fromarray((values * 2 ** (i + 5)).astype("uint16")).save(tmp_path / "deep" / f"{i}.png")
    for i in (1, 4):
        shutil.copy(tmp_path / "deep" / f"{i}.png", tmp_path / f"{i}.png")
    flags = "search", "--ckpt", model[1], "--data_path", tmp_path / "deep", "--nearest", 1
    run(*flags, tmp_path / "1.png", tmp_path / "4.png")
    out = capsys.readouterr().out
    assert all(f"   1.000  {tmp_path / 'deep' / name}" in out for name in ("1.png", "4.png"))
    Image.fromarray((values * 65535).astype("uint16")).save(tmp_path / "deep" / "8.png")
    run(*flags, tmp_path / "4.png")
    out = capsys.readouterr().out
    assert ": 0 of 9 images indexed" in out and f"   1.000  {tmp_path / 'deep' / '4.png'}" in out


def test_contact_sheet_shows_the_nearest(model, photos, tmp_path):
    save_shape(tmp_path / "query.png", 4)
    run("search", "--ckpt", model[1], "--data_path", photos, "--nearest", 2, tmp_path / "query.png")
    sheet = Image.open(model[1].with_suffix(".search") / "photos" / "query.png.nearest.png")
    sheet = np.asarray(sheet, int)
    with torch.no_grad():
        files = sorted(photos.rglob("*.png"))
        features = F.normalize(torch.cat([model[0](center_crop_view(Image.open(file), 32)[None]) for file in files]))
    order = (features @ features[files.index(photos / "a" / "4.png")]).argsort(descending=True)[:2]
    for i, file in enumerate([tmp_path / "query.png", *(files[j] for j in order)]):
        side = (1200 - 8) // 3 - 8
        expected = np.asarray(Image.open(file).convert("RGB").resize((side, side), Image.Resampling.BICUBIC), int)
        left = 8 + i * (side + 8)
        top = next(y for y in range(40, 80) if (sheet[y, left:left + side] < 255).any(axis=-1).all())
        found = sheet[top:top + side, left:left + side]
        assert np.abs(found - expected)[3:-3, 3:-3].max() <= 1  # within the query's frame


def test_unusual_names_and_duplicates(model, photos, tmp_path, capsys):
    names = ["two\nlines.png", "ünïcode ☃.png", "a" * 240 + ".png"]
    for name in names:
        save_shape(photos / "a" / name, 4)
    query = photos / "a" / names[2]
    for twin in ("link.png", "same.png"):  # the query under other names
        (photos / "b" / twin).symlink_to(query) if twin == "link.png" else os.link(query, photos / "b" / twin)
    run("search", "--ckpt", model[1], "--data_path", photos, "--nearest", 3, query, photos / "a" / names[0])
    out = capsys.readouterr().out
    first = out.split("->")[0]
    assert first.count("   1.000  ") == 3 and "link.png" not in first and "same.png" not in first
    assert names[1] in first and "4.png" in first
    assert len(list(model[1].with_suffix(".search").glob("photos/*.nearest.png"))) == 2


def test_contact_sheets_are_not_indexed(model, photos, capsys, exit_message):
    for _ in range(2):
        run("search", "--ckpt", model[1], "--data_path", photos, photos / "a" / "0.png", "--output_dir", photos / "out")
        assert "of 9 images" in capsys.readouterr().out
    run("search", "--ckpt", model[1], "--data_path", photos, "--nearest", 100, photos / "a" / "0.png")
    out = capsys.readouterr().out
    assert f"9 images in {photos} (passed over 2: " in out and "1 .safetensors" in out and "1 output(s) of other" in out
    assert out.partition("indexed")[2].count(str(photos)) == 1 + 8  # query and others
    line = exit_message(run, "search", "--ckpt", model[1], "--data_path", photos, photos / "a" / "0.png",
                        "--output_dir", photos)
    assert "outputs would be written among the images, choose another --output_dir" in line


def test_corrupt_queries_are_skipped(model, photos, tmp_path, exit_message):
    (tmp_path / "bad.png").write_bytes(b"bad")
    line = exit_message(run, "search", "--ckpt", model[1], "--data_path", photos, tmp_path / "bad.png",
                        photos / "b" / "1.png", tmp_path / "none.png")
    assert "2 of 3 queries cannot be read; the first: " in line and "bad.png" in line
    assert (model[1].with_suffix(".search") / "photos" / "1.png.nearest.png").exists()


@pytest.mark.slow
def test_two_processes_equal_one(model, photos, tmp_path, capsys, run_torchrun):
    save_shape(tmp_path / "query.png", 4)
    (photos / "a" / "bad.png").write_bytes(b"bad")
    argv = ["search", "--ckpt", str(model[1]), "--data_path", str(photos), str(tmp_path / "query.png")]
    run(*argv)
    expected = capsys.readouterr().out
    shutil.rmtree(model[1].with_suffix(".search"))
    run_torchrun(2, f"""
import contextlib, os, retrieve
with open({str(tmp_path)!r} + "/rank" + os.environ["RANK"], "w") as file, contextlib.redirect_stdout(file):
    retrieve.main(retrieve.parse_args({argv + ["--num_workers", "0", "--device", "cpu"]}))
""")
    assert (tmp_path / "rank0").read_text() == expected and (tmp_path / "rank1").read_text() == ""
    assert expected.count("skipped corrupt image") == 1 and expected.count("  0.") + expected.count("  1.") == 9
