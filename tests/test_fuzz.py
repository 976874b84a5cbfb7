"""Damaged and hostile files: thousands of them, each either read or refused in one line."""

import copy
import io
import json
import multiprocessing
import random
import resource
import shutil
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from step import build_networks, train_step

import train
from common.checkpoint import load_checkpoint, resume_run, save_checkpoint
from common.weights import CheckpointError, load_backbone, save_model
from data.images import ImageReadError, read_image
from data.loaders import center_crop_view

GIB = 2**30
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["train"])


def within_limits(target, *args):
    """Call target in a process that may take 6 GiB more of addresses and 10 minutes; returns what it sends."""
    ours, theirs = server.Pipe(duplex=False)
    process = server.Process(target=limited, args=(target, args, theirs))
    process.start()
    theirs.close()
    assert ours.poll(600), "hangs"
    result = ours.recv()  # EOFError: it crashed
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def limited(target, args, pipe):
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
    """Bytes with one to eight faults: flips, cuts, repeats, runs of zeros or ones, extreme numbers, other lengths."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        # Half the faults hit the first 200 bytes, where formats keep their sizes.
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


# ---- pictures ----

def originals(scene):
    """The scene in every format and many of the variants that open_rgb takes."""
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
        encoded(scene, "TIFF", compression="jpeg"), encoded(scene.convert("F"), "TIFF"), encoded(scene, "PPM")]


def read_all(contents, path, count):
    warnings.simplefilter("ignore")
    read, rng = 0, random.Random(0)
    for i in range(count):
        path.write_bytes(mutate(contents[i % len(contents)], rng))
        try:
            image = read_image(path)
        except ImageReadError as error:
            assert str(path) in str(error) and len(str(error)) < 2000
            continue
        assert image.mode == "RGB" and center_crop_view(image, 32).shape == (3, 32, 32)
        read += 1
    return read


def test_10000_damaged_pictures(scene, tmp_path):
    contents = originals(scene)
    for i, content in enumerate(contents):
        (tmp_path / "whole").write_bytes(content)
        assert min(read_image(tmp_path / "whole").size) == 61, i
    read, grown = within_limits(read_all, contents, tmp_path / "damaged", 10_000)
    print(f"{read} of 10,000 damaged pictures could be read, memory grew by {grown / 2**20:.0f} MiB")
    assert 1000 < read < 9000 and grown < 2.5 * GIB


@pytest.mark.parametrize("width, height, words", [
    (60_000, 60_000, "decompression bomb"), (20_000, 9_000, "decompression bomb"), (6_000, 10, "more of a line")])
def test_absurd_sizes_are_refused(tmp_path, width, height, words):
    """A few bytes that claim to be gigabytes, as PNG, PPM and BMP."""
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


def test_only_picture_formats_are_opened(tmp_path):
    """What Pillow knows besides (EPS starts a program) is not asked, whatever the content says."""
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n")
    with pytest.raises(ImageReadError, match="cannot identify image file"):
        read_image(tmp_path / "a.jpg")


# ---- checkpoints ----

TINY = ("--arch vit_tiny --patch_size 8 --embed_dim 64 --depth 1 --num_heads 1 --out_dim 8 --hidden_dim 8 "
        "--global_crops_size 16 --local_crops_number 0 --device cpu --precision fp16").split()


def small_run():
    """What a run saves: its objects by name, the description of its networks, and a fresh progress."""
    args = train.parse_args(TINY)
    vit, head = train.model_arguments(args)
    student, teacher = build_networks(vit, head)
    info = dict(arch=args.arch, backbone=vit, head=head, patch_size=8, image_size=16, mean=train.IMAGENET_MEAN,
                std=train.IMAGENET_STD, data_path="shapes")
    objects = dict(student=student, teacher=teacher, dino_loss=train.DINOLoss(8),
                   optimizer=train.build_optimizer("adamw", train.param_groups(student)),
                   scaler=torch.amp.GradScaler("cpu"))
    return objects, info, dict(step=0, knn={}, epoch_stats=[], unreadable=[], log_bytes=0)


def strange(rng):
    """A value that has no business where it is put."""
    return rng.choice((
        lambda: None, lambda: -1, lambda: 10**30, lambda: float("nan"), lambda: "text", lambda: [], lambda: {},
        lambda: {"a": [1, {"b": ()}]}, lambda: torch.empty(0), lambda: torch.tensor(float("inf")),
        lambda: torch.ones(1).expand(2**40), lambda: torch.ones(1).expand(2**20, 2**20), lambda: torch.ones(7, 5),
        lambda: torch.ones(3, 3).to_sparse(), lambda: torch.empty(10**9, device="meta"),
        lambda: torch.ones(3, dtype=torch.int8), lambda: torch.ones(3, dtype=torch.complex64),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)))()


def disturb(state, rng):
    """A copy of a nest of dicts with one to three values replaced, renamed, moved or lost."""
    state = copy.deepcopy(state)
    for _ in range(rng.randint(1, 3)):
        place = state
        while True:
            inner = [value for value in place.values() if isinstance(value, dict) and value]
            if not inner or rng.random() < 0.25:
                break
            place = rng.choice(inner)
        if not place:
            continue
        name, kind = rng.choice(list(place)), rng.randrange(4)
        if kind == 0:
            del place[name]
        elif kind == 1:
            place[rng.choice((0, "", "x" * 5000, "blocks.999999999.x", str(name) + ".0"))] = place.pop(name)
        elif kind == 2:
            place[name] = place[rng.choice(list(place))]
        else:
            place[name] = strange(rng)
    return state


def quiet(text):
    pass


def unless_refused(path, function, *args, **kwargs):
    """What the function returns, or None if it refuses the file in one line that names it."""
    try:
        return function(*args, **kwargs)
    except CheckpointError as error:
        assert str(path) in str(error) and len(str(error)) < 20_000
        return None


def load_all(folder, count):
    warnings.simplefilter("ignore")
    rng = random.Random(0)
    objects, info, progress = small_run()
    flags = {"lr": 0.1}
    states = {name: thing.state_dict() for name, thing in objects.items()}
    save_checkpoint(folder / "run.pth", **states, info=info, progress=progress, fixed={"arch": "vit_tiny"}, flags=flags)
    save_model(folder / "model.safetensors", states["teacher"], info)
    state = load_checkpoint(folder / "run.pth")
    torch.save(states["student"], folder / "legacy.pth", _use_new_zipfile_serialization=False)
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    metadata = {key: json.dumps(value) for key, value in info.items()}
    loaded = dict.fromkeys((*contents, "values", "metadata"), 0)
    for i in range(count):
        kind = list(loaded)[i % len(loaded)]
        path = folder / f"damaged{'.safetensors' if kind in ('model.safetensors', 'metadata') else '.pth'}"
        if kind in contents:
            path.write_bytes(mutate(contents[kind], rng))
        elif kind == "values":
            torch.save(disturb(state, rng), path)
        else:
            broken = disturb({"info": info}, rng).get("info")
            broken = broken if isinstance(broken, dict) else {"backbone": broken}
            words = {str(k): json.dumps(v, default=str) if rng.random() < 0.9 else "{" for k, v in broken.items()}
            save_file(states["teacher"], path, metadata | words)
        model = unless_refused(path, load_backbone, path, log=quiet)
        resumed = unless_refused(path, resume_run, path, {"arch": "vit_tiny"}, flags, objects, dict(progress), say=quiet)
        if model:
            model, _ = model
            loaded[kind] += 1
            height, width = (side * model.patch_size for side in model.grid)
            with torch.no_grad():
                assert model(torch.zeros(1, model.in_chans, height, width)).shape == (1, model.embed_dim)
        if resumed:
            assert all(p.isfinite().all() for p in objects["student"].parameters())
            small_step(objects)
    shutil.rmtree(folder)
    return loaded


def small_step(objects):
    """What is resumed must be able to train."""
    args = train.parse_args(TINY)
    views = [torch.zeros(2, 3, 16, 16)] * 2
    train_step(*objects.values(), torch.tensor(0), [views], train.settings_at(500, 10, 256, args), args.precision)


def test_2000_damaged_checkpoints(tmp_path):
    loaded, grown = within_limits(load_all, tmp_path, 2_000)
    print(f"loaded of 400 each: {loaded}, memory grew by {grown / 2**20:.0f} MiB")
    # Flipped bits within the weights of a safetensors or an old file cannot be told from weights; torch.save's can.
    assert loaded["run.pth"] < 40 and 0 < loaded["model.safetensors"] < 300 and 0 < loaded["values"] < 350
    assert grown < GIB


def test_a_zip_bomb_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(50_000_000))
    with pytest.raises(CheckpointError, match="claims to hold more than it does"):
        load_checkpoint(tmp_path / "bomb.pth")


def test_nothing_is_fetched_for_a_file(tmp_path, monkeypatch):
    """A model file that says it was trained on a torchvision set does not make that set be downloaded."""
    from data import datasets as data

    asked = []
    monkeypatch.setattr(data.torchvision.datasets.CIFAR10, "download", lambda self: asked.append(self.root))
    with pytest.raises(data.DataError, match="torchvision cannot open it"):
        data.open_data(f"cifar10:{tmp_path}/elsewhere", download=False)
    assert asked == [] and not (tmp_path / "elsewhere").exists()
    with pytest.raises(data.DataError):
        data.open_data(f"cifar10:{tmp_path}/elsewhere")
    assert asked == [f"{tmp_path}/elsewhere"]

