import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

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
from data.datasets import DataError, ImageFolder
from data.loaders import center_crop_view
from data.retrieval import read_copydays, read_landmarks
from data.shapes import Shapes
from evaluation.descriptor import cls_and_gem_features, fit_whitening

ROOT = Path(__file__).parents[1]


def save_shape(path, i, size=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    Shapes("test", 2000, size)[i][0].save(path, quality=95)


def run(*argv):
    retrieve.main(retrieve.parse_args([str(x) for x in argv] + ["--num_workers", "0", "--device", "cpu"]))


def normalised(image):
    return TF.normalize(TF.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)[None]


def mean_ap(similarity, positives):
    """Areas below scikit-learn's curves, percent."""
    aps = []
    for scores, right in zip(similarity.numpy(), positives):
        precision, recall, _ = precision_recall_curve(np.isin(np.arange(len(scores)), right), scores)
        aps.append(auc(recall, precision) if (scores > scores[right]).sum() < 20 else 0.0)  # only 20 are looked at
    return 100 * np.mean(aps)


# ---- copies ----

def strong_edits(image):
    """What a copy may have gone through: (picture, JPEG quality) each."""
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
    """Copies of 12 pictures, and 50 others beside them; of --pictures if that is given."""
    real = request.config.getoption("--images")
    images = ImageFolder(real) if real else Shapes("test", 62, 64)
    pictures = [images[i][0] for i in range(62)]
    make_copydays(tmp_path / "copydays", pictures[:12])
    (tmp_path / "others").mkdir()
    for i, image in enumerate(pictures[12:]):
        image.save(tmp_path / "others" / f"{i:02}.png")
    return tmp_path / "copydays"


@pytest.mark.parametrize("whitening", [False, True])
@torch.no_grad()
def test_copies_equal_the_protocol_by_hand(model, copydays, capsys, whitening):
    network, path = model
    others = copydays.parent / "others"
    run("copies", "--ckpt", path, "--data_path", copydays, "--image_size", 48, "--distractors", others,
        "--batch_size_per_gpu", 7, *["--whitening", others] * whitening)
    result = json.loads(path.with_suffix(".copies.json").read_text())

    def features(folder):
        images = [Image.open(file).convert("RGB").resize((48, 48), Image.Resampling.BICUBIC)
                  for file in sorted(folder.iterdir())]
        return cls_and_gem_features(network, torch.cat([normalised(image) for image in images]))
    database, strong, jpeg = (features(copydays / name) for name in ("original", "strong", "jpegqual/5"))
    distractors = features(others)
    white = fit_whitening(distractors) if whitening else lambda x: x
    database = F.normalize(white(torch.cat((database, distractors))), dim=1)
    strong, jpeg = (F.normalize(white(x), dim=1) @ database.T for x in (strong, jpeg))
    assert result["mAP"]["strong"] == pytest.approx(mean_ap(strong, [i // 4 for i in range(48)]))
    assert result["mAP"]["jpegqual/5"] == pytest.approx(mean_ap(jpeg, range(12)))
    assert result["database"] == 62 and list(result["mAP"]) == ["strong", "jpegqual/5"]
    out = capsys.readouterr().out
    assert f"strong          48 queries  {result['mAP']['strong']:5.1f}" in out
    assert ("it may do harm" in out) == whitening  # 50 pictures, 64 features
    assert f"distractors: 50 pictures of {others}" in out


def test_layout_of_copydays(copydays, tmp_path):
    for name in ("crops/80", "crops/10", "jpegqual/75"):
        shutil.copytree(copydays / "jpegqual" / "5", copydays / name)
    originals, blocks = read_copydays(copydays)
    (copydays / "jpegqual" / ".DS_Store").write_text("")
    (copydays / "crops" / "notes.txt").write_text("")
    originals, blocks = read_copydays(copydays)
    assert list(blocks) == ["strong", "crops/10", "crops/80", "jpegqual/5", "jpegqual/75"] and len(originals) == 12
    assert blocks["strong"][1] == [[i // 4] for i in range(48)]
    save_shape(copydays / "strong" / "999901.jpg", 0)
    with pytest.raises(DataError, match="999901.jpg: no picture in .*original has a name with the same first four"):
        read_copydays(copydays)
    (tmp_path / "half").mkdir()
    shutil.copytree(copydays / "original", tmp_path / "half" / "original")
    with pytest.raises(DataError, match="expected strong/, jpegqual/N/ or crops/N/ beside original/"):
        read_copydays(tmp_path / "half")


def test_a_copy_that_cannot_be_read_ends_it(model, copydays, exit_message):
    (copydays / "strong" / "200301.jpg").write_bytes(b"bad")
    line = exit_message(run, "copies", "--ckpt", model[1], "--data_path", copydays, "--image_size", 48)
    assert "1 of 48 pictures cannot be read; the first: " in line and "200301.jpg" in line


# ---- landmarks ----

@pytest.fixture
def oxford(tmp_path):
    """Ten pictures of 90 x 61, three queries, ground truth as published."""
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
def test_landmarks_equal_the_protocol_by_hand(model, oxford, capsys, crop):
    network, path = model
    root, truth = oxford
    run("landmarks", "--ckpt", path, "--data_path", root.parent, "--image_size", 64, *["--crop_queries"] * crop)
    result = json.loads(path.with_suffix(".landmarks.json").read_text())["result"]["roxford5k/gnd_roxford5k.pkl"]

    def feature(name, box=None):
        image = Image.open(root / "jpg" / f"{name}.jpg").convert("RGB")
        image = image.crop([round(side) for side in box]) if box else image
        image.thumbnail((64, 64), Image.Resampling.LANCZOS)
        x, total = normalised(image), 0
        for scale in (1, 2 ** -0.5, 0.5):
            y = x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bilinear")
            total = total + network(y[..., :y.shape[-2] // 8 * 8, :y.shape[-1] // 8 * 8])
        return F.normalize(total)[0]
    database = torch.stack([feature(name) for name in truth["imlist"]])
    queries = torch.stack([feature(name, answer["bbx"] if crop else None)
                           for name, answer in zip(truth["qimlist"], truth["gnd"])])
    similarity = queries @ database.T
    for level, (right, passed) in dict(easy=(["easy"], ["hard", "junk"]), medium=(["easy", "hard"], ["junk"]),
                                       hard=(["hard"], ["easy", "junk"])).items():
        aps, first = [], []
        for scores, answer in zip(similarity, truth["gnd"]):
            kept = [i for i in range(10) if not any(i in answer[name] for name in passed)]
            positives = [any(i in answer[name] for name in right) for i in kept]
            if any(positives):
                precision, recall, _ = precision_recall_curve(positives, scores[kept].numpy())
                aps.append(auc(recall, precision))
                right_first = np.array(positives)[scores[kept].argsort(descending=True).numpy()]
                last = right_first.nonzero()[0][-1] + 1
                first.append([right_first[:min(k, last)].mean() for k in (1, 5, 10)])
        assert result[level]["mAP"] == pytest.approx(100 * np.mean(aps))
        assert [result[level][f"mP@{k}"] for k in (1, 5, 10)] == pytest.approx(100 * np.mean(first, axis=0))
    assert f"medium   {result['medium']['mAP']:5.1f}" in capsys.readouterr().out


def test_one_scale_and_whitening(model, oxford, tmp_path):
    _, path = model
    root, _ = oxford
    for i in range(40):
        save_shape(tmp_path / "others" / f"{i}.png", i)
    results = []
    for flags in ([], ["--multiscale", "false"], ["--whitening", tmp_path / "others"]):
        run("landmarks", "--ckpt", path, "--data_path", root, "--image_size", 64, *flags)
        results.append(json.loads(path.with_suffix(".landmarks.json").read_text())["result"])
    assert results[0] != results[1] and results[0] != results[2]


def test_two_benchmarks_share_one_whitening(model, oxford, tmp_path, capsys):
    root, truth = oxford
    shutil.copytree(root, root.parent / "rparis6k")
    save_shape(tmp_path / "others" / "1.png", 1)
    run("landmarks", "--ckpt", model[1], "--data_path", root.parent, "--image_size", 64, "--whitening",
        tmp_path / "others")
    assert capsys.readouterr().out.count("whitening: 1 pictures of") == 1
    result = json.loads(model[1].with_suffix(".landmarks.json").read_text())["result"]
    assert list(result) == ["roxford5k/gnd_roxford5k.pkl", "rparis6k/gnd_roxford5k.pkl"]


def test_boxes_are_of_the_file_as_it_lies(tmp_path):
    image = Image.new("RGB", (90, 40))
    image.paste((255, 255, 255), (60, 10, 80, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    path = str(tmp_path / "turned.png")
    assert Image.open(path).getexif()[0x0112] == 6 and retrieve.open_rgb(path).size == (40, 90)
    cut, number = retrieve.Files([path], [(60, 10, 80, 30)], upright=False)[0]
    assert cut.size == (20, 20) and cut.getextrema() == ((255, 255),) * 3 and number == 0
    assert retrieve.Files([path], [(80, 30, 200, 99)], upright=False)[0][0].size == (10, 10)  # what is in the picture
    with pytest.raises(OSError, match=r"the box \(95, 0, 99, 9\) lies outside its 90 x 40 pixels"):
        retrieve.Files([path], [(95, 0, 99, 9)], upright=False)[0]


class Evil:
    """A pickle of it calls a function with an argument."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("damage, words", [
    (lambda truth: Evil(os.system, "echo broken into > broken"), "UnpicklingError: asks for posix.system"),
    (lambda truth: Evil(eval, "open('broken', 'w')"), "UnpicklingError: asks for builtins.eval"),
    (lambda truth: Evil(np.save, "broken", 1), "UnpicklingError: asks for numpy.save"),
    (lambda truth: truth | dict(qimlist=[], gnd=[]), "its parts do not fit each other"),
    (lambda truth: truth | dict(gnd=[truth["gnd"][0] | dict(bbx=[50.0, 5, 10, 30])] * 3), "a box is none"),
    (lambda truth: truth | dict(gnd=[truth["gnd"][0] | dict(bbx=[5.0, 5, 5, 30])] * 3), "a box is none"),
    (lambda truth: [1, 2], "TypeError"),
    (lambda truth: truth | dict(gnd=truth["gnd"][:1]), "its parts do not fit each other"),
    (lambda truth: truth | dict(imlist=["p1"]), "its parts do not fit each other"),
    (lambda truth: truth | dict(qimlist=["p10", "p11", "lost"]), "1 of the pictures that it names are missing"),
])
def test_ground_truth_that_is_none(oxford, monkeypatch, damage, words):
    root, truth = oxford
    monkeypatch.chdir(root)
    file = root / "gnd_roxford5k.pkl"
    file.write_bytes(pickle.dumps(damage(truth)))
    with pytest.raises(DataError, match=words):
        read_landmarks(file)
    assert not (root / "broken").exists() and not (root / "broken.npy").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_ground_truth_of_any_pickle(oxford, protocol):
    root, truth = oxford
    (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth, protocol=protocol))
    read = read_landmarks(root / "gnd_roxford5k.pkl")
    assert read.answers[0] == dict(easy=[1, 2], hard=[5], junk=[0, 7]) and read.boxes[0] == [10, 5, 70, 51]
    assert read.name == "roxford5k" and read.queries[2].endswith("p12.jpg")


# ---- search ----

@pytest.fixture
def photos(tmp_path):
    for i in range(9):
        save_shape(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png", i)
    return tmp_path / "photos"


@torch.no_grad()
def test_search_finds_what_is_nearest(model, photos, tmp_path, capsys):
    network, path = model
    save_shape(tmp_path / "query.png", 4)
    run("search", "--ckpt", path, "--data_path", photos, "--nearest", 3, tmp_path / "query.png", photos / "a" / "2.png")
    first, second = capsys.readouterr().out.split(f"{photos / 'a' / '2.png'}:\n")
    files = sorted(photos.rglob("*.png"))
    features = F.normalize(torch.cat([network(center_crop_view(Image.open(file), 32)[None]) for file in files]))
    scores = features @ features[files.index(photos / "a" / "4.png")]
    order = scores.argsort(descending=True)[:3].tolist()
    assert [f"  {scores[i]:6.3f}  {files[i]}" for i in order] == first.splitlines()[-4:-1]
    assert "   1.000  " + str(photos / "a" / "4.png") in first and str(photos / "a" / "2.png") not in second  # itself
    output = path.with_suffix(".search")
    for name in ("query.png.0.nearest.png", "2.png.1.nearest.png"):
        assert Image.open(output / name).size == (4 * 188 + 8, 8 + 64 + 24 + 8)
    index = next(output.glob("photos-*.safetensors")).stat().st_mtime_ns
    run("search", "--ckpt", path, "--data_path", photos, tmp_path / "query.png")
    out = capsys.readouterr().out
    assert "has 9 of 9 pictures" in out and len(list(output.glob("*.safetensors"))) == 1
    assert next(output.glob("photos-*.safetensors")).stat().st_mtime_ns == index
    again = "search", "--ckpt", path, tmp_path / "query.png", "--output_dir", output, "--data_path"
    for flags in (["--untrained"], ["--image_size", 64]):  # features of another kind have a file of their own
        run(*again, photos, *flags)
        assert "has 0 of 9 pictures" in capsys.readouterr().out
    shutil.copytree(photos, tmp_path / "elsewhere" / "photos")
    run(*again, tmp_path / "elsewhere" / "photos")
    assert "has 0 of 9 pictures" in capsys.readouterr().out
    save_model(path, {f"backbone.{k}": v + 0.01 for k, v in network.state_dict().items()},
               dict(backbone=dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)))
    run(*again, photos)  # trained on, under the same name
    assert "has 0 of 9 pictures" in capsys.readouterr().out


def test_the_sheet_shows_what_was_found(model, photos, tmp_path):
    save_shape(tmp_path / "query.png", 4)
    run("search", "--ckpt", model[1], "--data_path", photos, "--nearest", 2, tmp_path / "query.png")
    sheet = Image.open(model[1].with_suffix(".search") / "query.png.nearest.png")
    with torch.no_grad():
        files = sorted(photos.rglob("*.png"))
        features = F.normalize(torch.cat([model[0](center_crop_view(Image.open(file), 32)[None]) for file in files]))
    order = (features @ features[files.index(photos / "a" / "4.png")]).argsort(descending=True)[:2]
    for i, file in enumerate([tmp_path / "query.png", *(files[j] for j in order)]):
        left = 8 + i * 188
        assert sheet.crop((left, 8, left + 64, 8 + 64)).tobytes() == Image.open(file).convert("RGB").tobytes()


def test_names_of_any_kind_and_duplicates(model, photos, tmp_path, capsys):
    names = ["two\nlines.png", "ünïcode ☃.png", "a" * 240 + ".png"]
    for name in names:
        save_shape(photos / "a" / name, 4)
    query = photos / "a" / names[2]
    for twin in ("link.png", "same.png"):  # the query itself by other names
        (photos / "b" / twin).symlink_to(query) if twin == "link.png" else os.link(query, photos / "b" / twin)
    run("search", "--ckpt", model[1], "--data_path", photos, "--nearest", 3, query, photos / "a" / names[0])
    out = capsys.readouterr().out
    first = out.split("->")[0]
    assert first.count("   1.000  ") == 3 and "link.png" not in first and "same.png" not in first
    assert names[1] in first and "4.png" in first
    assert len(list(model[1].with_suffix(".search").glob("*.nearest.png"))) == 2


def test_sheets_are_not_found(model, photos, tmp_path, capsys):
    for _ in range(2):
        run("search", "--ckpt", model[1], "--data_path", photos, photos / "a" / "0.png", "--output_dir", photos / "out")
        assert "of 9 pictures" in capsys.readouterr().out
    run("search", "--ckpt", model[1], "--data_path", photos, "--nearest", 100, photos / "a" / "0.png")
    assert capsys.readouterr().out.count(str(photos)) == 1 + 8 + 1  # the query, the others and, from here, a sheet


def test_queries_that_cannot_be_read_leave_the_others(model, photos, tmp_path, exit_message):
    (tmp_path / "bad.png").write_bytes(b"bad")
    line = exit_message(run, "search", "--ckpt", model[1], "--data_path", photos, tmp_path / "bad.png",
                   photos / "b" / "1.png", tmp_path / "none.png")
    assert "2 of 3 queries cannot be read; the first: " in line and "bad.png" in line
    assert (model[1].with_suffix(".search") / "1.png.1.nearest.png").exists()


def test_two_processes_find_the_same(model, photos, tmp_path):
    _, path = model
    save_shape(tmp_path / "query.png", 4)
    (photos / "a" / "bad.png").write_bytes(b"bad")
    outputs = []
    for start in ([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                                     "--master_port=29671"]):
        result = subprocess.run(
            [*start, str(ROOT / "retrieve.py"), "search", "--ckpt", str(path), "--data_path", str(photos), "--device",
             "cpu", "--num_workers", "0", "--output_dir", str(tmp_path / f"out{len(outputs)}"),
             str(tmp_path / "query.png")], capture_output=True, text=True, timeout=120, cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
        outputs.append([line for line in result.stdout.splitlines() if line.startswith("  ") and "->" not in line])
        assert result.stdout.count("skipped unreadable picture") == 1
    assert outputs[0] == outputs[1] and len(outputs[0]) == 9
