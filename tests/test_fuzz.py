"""Fuzzing: corrupt and hostile images and checkpoints are either read or rejected in one line.

A sample runs by default, thousands of files with --slow.
"""

import copy
import io
import json
import multiprocessing
import random
import resource
import struct
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

import train
from common.checkpoint import CheckpointError, Run, load_checkpoint
from common.logger import Logger
from common.weights import load_backbone, save_model
from data.datasets import DataError, open_data
from data.images import ImageReadError, read_image
from data.loaders import center_crop_view

GIB = 2**30
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["train"])


def run_limited(target, *args):
    """Result of target(*args) in a process with 6 GiB of address space and 10 minutes, and by how much it grew."""
    receiver, sender = server.Pipe(duplex=False)
    process = server.Process(target=limit_and_run, args=(target, args, sender))
    process.start()
    sender.close()
    assert receiver.poll(600), "hangs"
    result = receiver.recv()  # EOFError: it crashed
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def limit_and_run(target, args, pipe):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 6 * GIB,) * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        result = target(*args)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        pipe.send((result, grown))
    except Exception as error:
        pipe.send(AssertionError(f"{type(error).__name__}: {str(error)[:2000]}"))


def mutate(content, rng):
    """Bytes with one to eight faults: flips, cuts, repeats, runs of zeros or ones, extreme integers, noise."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        # half of the faults hit the first 200 bytes, where formats keep sizes
        at = rng.randrange(min(len(content), 200) if rng.random() < 0.5 else len(content)) if content else 0
        length = rng.choice((1, 2, 4, 8, 64, 1000))
        kind = rng.randrange(7)
        if kind == 0 and content:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            content[at:at] = content[at:at + length]
        elif kind == 3:
            content[at:at + length] = bytes([rng.choice((0, 255))]) * length
        elif kind == 4:
            number = rng.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 65500, 30000))
            content[at:at + 4] = struct.pack(rng.choice("<>") + "I", number)
        elif kind == 5:
            del content[at:at + length]
        else:
            content[at:at + length] = rng.randbytes(length)
    return bytes(content)


# ---- images ----

def encode_all(scene):
    """The scene in every format and many of the variants that read_image takes."""
    def encoded(image, name, **options):
        file = io.BytesIO()
        image.save(file, name, **options)
        return file.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6
    icc = b"\0" * 128
    return [
        encoded(scene, "JPEG"), encoded(scene, "JPEG", progressive=True, exif=exif, icc_profile=icc),
        encoded(scene.convert("CMYK"), "JPEG"), encoded(scene, "PNG"), encoded(scene.convert("RGBA"), "PNG", exif=exif),
        encoded(scene.convert("P"), "PNG", transparency=3), encoded(scene.convert("I;16"), "PNG"),
        encoded(scene, "WEBP"), encoded(scene.convert("RGBA"), "WEBP", lossless=True), encoded(scene, "BMP"),
        encoded(scene.convert("P"), "GIF", save_all=True, append_images=[scene.convert("P")]),
        encoded(scene, "TIFF"), encoded(scene, "TIFF", compression="tiff_lzw"),
        encoded(scene, "TIFF", compression="jpeg"), encoded(scene.convert("F"), "TIFF"), encoded(scene, "PPM"),
        *(encoded(scene, kind) for kind in ("AVIF", "JPEG2000", "QOI") if kind in Image.SAVE)]


def read_mutated_images(contents, path, count):
    warnings.simplefilter("ignore")
    num_read, rng = 0, random.Random(0)
    for i in range(count):
        path.write_bytes(mutate(contents[i % len(contents)], rng))
        try:
            image = read_image(path)
        except ImageReadError as error:
            assert str(path) in str(error) and len(str(error)) < 2000
            continue
        assert image.mode == "RGB" and center_crop_view(image, 32).shape == (3, 32, 32)
        num_read += 1
    return num_read


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_corrupt_images(scene, tmp_path, count):
    contents = encode_all(scene)
    for i, content in enumerate(contents):
        (tmp_path / "intact").write_bytes(content)
        assert min(read_image(tmp_path / "intact").size) == 61, i
    num_read, grown = run_limited(read_mutated_images, contents, tmp_path / "corrupt", count)
    print(f"{num_read} of {count} corrupt images could be read, memory grew by {grown / 2**20:.0f} MiB")
    assert 0.1 * count < num_read < 0.9 * count and grown < 2.5 * GIB


@pytest.mark.parametrize("width, height, words", [
    (60_000, 60_000, "decompression bomb"), (20_000, 9_000, "decompression bomb"), (6_000, 10, "100 times the other")])
def test_absurd_sizes_are_rejected(tmp_path, width, height, words):
    """A few bytes that claim gigabytes of pixels, as PNG, PPM and BMP."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zipfile.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    bmp = b"BM" + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(png)
    (tmp_path / "b.png").write_bytes(b"P6 %d %d 255\n" % (width, height))
    (tmp_path / "c.png").write_bytes(bmp)
    for name in "abc":
        with pytest.raises(ImageReadError, match=f"{name}.png: .*{words}"):
            read_image(tmp_path / f"{name}.png")


def test_only_common_image_formats_are_opened(tmp_path):
    """Of Pillow's others, some start a program (EPS)."""
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n")
    with pytest.raises(ImageReadError, match="cannot identify image file"):
        read_image(tmp_path / "a.jpg")


# ---- checkpoints ----

TINY = ("--arch vit_tiny --patch_size 8 --embed_dim 64 --depth 1 --num_heads 1 --out_dim 8 --hidden_dim 8 "
        "--global_crops_size 16 --local_crops_number 0 --device cpu --precision fp16").split()


def build_run(folder):
    """A run with a tiny model, and the description of its model."""
    args = train.parse_args(TINY)
    objects = train.build_training(args, torch.device("cpu"), world_size=1)
    info = train.model_info(args, SimpleNamespace(path="shapes"))
    logger = Logger(folder / "log.jsonl", is_silent=True)
    return Run(folder, "pretraining", objects, {"arch": "vit_tiny"}, {"lr": 0.1}, dict(knn={}, epoch_stats=[]), logger,
               extra=dict(info=info)), info


def random_value(rng):
    """A value of a wrong type, shape or size."""
    return rng.choice((
        lambda: None, lambda: -1, lambda: 10**30, lambda: float("nan"), lambda: "text", lambda: [], lambda: {},
        lambda: {"a": [1, {"b": ()}]}, lambda: torch.empty(0), lambda: torch.tensor(float("inf")),
        lambda: torch.ones(1).expand(2**40), lambda: torch.ones(1).expand(2**20, 2**20), lambda: torch.ones(7, 5),
        lambda: torch.ones(3, 3).to_sparse(), lambda: torch.empty(10**9, device="meta"),
        lambda: torch.ones(3, dtype=torch.int8), lambda: torch.ones(3, dtype=torch.complex64),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)))()


def mutate_state(state, rng):
    """A copy of a nest of dicts with one to three values replaced, renamed, moved or deleted."""
    state = copy.deepcopy(state)
    for _ in range(rng.randint(1, 3)):
        parent = state
        while True:
            children = [value for value in parent.values() if isinstance(value, dict) and value]
            if not children or rng.random() < 0.25:
                break
            parent = rng.choice(children)
        if not parent:
            continue
        name, kind = rng.choice(list(parent)), rng.randrange(4)
        if kind == 0:
            del parent[name]
        elif kind == 1:
            parent[rng.choice((0, "", "x" * 5000, "blocks.999999999.x", str(name) + ".0"))] = parent.pop(name)
        elif kind == 2:
            parent[name] = parent[rng.choice(list(parent))]
        else:
            parent[name] = random_value(rng)
    return state


def try_to_load(path, load, *args, **kwargs):
    """What `load` returns, or None if it rejects the file in one line that names it."""
    try:
        return load(*args, **kwargs)
    except CheckpointError as error:
        assert str(path) in str(error) and len(str(error)) < 20_000
        return None


def load_mutated_checkpoints(folder, count):
    warnings.simplefilter("ignore")
    rng, (run, info) = random.Random(0), build_run(folder)
    run.save(0)
    weights = run.objects["teacher"].state_dict()
    save_model(folder / "model.safetensors", weights, info)
    state = load_checkpoint(run.path)
    torch.save(weights, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    contents = {name: (folder / name).read_bytes() for name in ("checkpoint.pth", "model.safetensors", "legacy.pth")}
    metadata = {key: json.dumps(value) for key, value in info.items()}
    num_loaded = dict.fromkeys((*contents, "values", "metadata"), 0)
    for i in range(count):
        kind = list(num_loaded)[i % len(num_loaded)]
        path = run.path.with_suffix(".safetensors" if kind in ("model.safetensors", "metadata") else ".pth")
        if kind in contents:
            path.write_bytes(mutate(contents[kind], rng))
        elif kind == "values":
            torch.save(mutate_state(state, rng) | {"scaler": state["scaler"]}, path)
        else:
            broken = mutate_state({"info": info}, rng).get("info")
            broken = broken if isinstance(broken, dict) else {"backbone": broken}
            texts = {str(k): json.dumps(v, default=str) if rng.random() < 0.9 else "{" for k, v in broken.items()}
            save_file(weights, path, metadata | texts)
        model = try_to_load(path, load_backbone, path, log=lambda text: None)
        if model:
            model, _ = model
            num_loaded[kind] += 1
            height, width = (side * model.patch_size for side in model.grid)
            with torch.no_grad():
                assert model(torch.zeros(1, model.in_chans, height, width)).shape == (1, model.embed_dim)
        if path == run.path and try_to_load(path, run.load_newest):
            assert all(p.isfinite().all() for p in run.objects["student"].parameters())
            take_step(run.objects)
    return num_loaded


def take_step(objects):
    """A resumed run must be able to train."""
    args, crops = train.parse_args(TINY), [torch.zeros(2, 3, 16, 16)] * 2
    train.train_step(*objects.values(), [crops], train.compute_schedule(500, 10, 256, args), args, torch.tensor(True))


@pytest.mark.parametrize("count", [100, pytest.param(2_000, marks=pytest.mark.slow)])
def test_corrupt_checkpoints(tmp_path, count):
    num_loaded, grown = run_limited(load_mutated_checkpoints, tmp_path, count)
    print(f"loaded of {count / 5:.0f} each: {num_loaded}, memory grew by {grown / 2**20:.0f} MiB")
    # safetensors and old files have no checksums, so flipped bits in their weights go unnoticed
    assert num_loaded["checkpoint.pth"] <= 0.02 * count and grown < GIB
    assert num_loaded["model.safetensors"] <= 0.15 * count and 0 < num_loaded["values"] <= 0.175 * count
    # the order of a safetensors header is random, and so is whether any of a small sample can be loaded
    assert num_loaded["model.safetensors"] > 0 or count < 1000
    assert num_loaded["model.safetensors"] + num_loaded["legacy.pth"] > 0


def test_zip_bomb_is_rejected(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(50_000_000))
    with pytest.raises(CheckpointError, match="entries are larger than the file"):
        load_checkpoint(tmp_path / "bomb.pth")


def test_data_path_of_a_file_is_not_downloaded(tmp_path, monkeypatch):
    """A model file that names a torchvision dataset must not start a download."""
    downloads = []
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", lambda self: downloads.append(self.root))
    with pytest.raises(DataError, match="torchvision cannot open it"):
        open_data(f"cifar10:{tmp_path}/elsewhere", download=False)
    assert downloads == [] and not (tmp_path / "elsewhere").exists()
    with pytest.raises(DataError):
        open_data(f"cifar10:{tmp_path}/elsewhere")
    assert downloads == [f"{tmp_path}/elsewhere"]
