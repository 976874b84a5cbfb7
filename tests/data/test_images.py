import io
import os
import socket
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import infer
from data.folders import ImageFolder
from data.images import (
    ImageReadError,
    find_common_range,
    find_value_range,
    read_image,
    show_channels,
    wrap_decode_errors,
)
from data.segmentation import read_mask

RAMP = np.tile(np.arange(256), (64, 1))


# ---- more than 8 bits ----

@pytest.mark.parametrize("name, values, expected", [
    ("16.png", (RAMP * 257).astype("uint16"), RAMP),
    ("12.png", (RAMP * 16).astype("uint16"), np.floor(RAMP * 16 * 255 / 4095 + 0.5)),
    ("12.tif", (RAMP * 16).astype("uint16"), np.floor(RAMP * 16 * 255 / 4095 + 0.5)),
    ("8_in_16.png", RAMP.astype("uint16"), RAMP),
    ("offset.tif", (RAMP * 8 + 30_000).astype("uint16"), RAMP),
    ("hounsfield.tif", (RAMP * 12 - 1024).astype("int32"), RAMP),
    ("unit.tif", (RAMP / 255).astype("float32"), RAMP),
    ("above_1.tif", (RAMP * 1.01 / 255).astype("float32"), RAMP),
    ("dark.tif", (RAMP * 1e-3 / 255).astype("float32"), RAMP)])
def test_values_of_more_than_8_bits_are_seen(tmp_path, name, values, expected):
    Image.fromarray(values).save(tmp_path / name)
    seen = np.asarray(read_image(tmp_path / name))
    assert seen.shape == (64, 256, 3) and (seen == expected[..., None]).all()


def test_missing_values_are_black_and_change_no_other(tmp_path):
    values = (RAMP / 255).astype("float32")
    values[:2, ::2], values[2, :4] = -3.4028235e38, (np.nan, np.inf, -np.inf, np.nan)
    Image.fromarray(values).save(tmp_path / "a.tif")
    seen = np.asarray(read_image(tmp_path / "a.tif"))[..., 0]
    assert (seen[3:] == RAMP[3:]).all() and (seen[:2, 1::2] == RAMP[:2, 1::2]).all() and (seen[:2, ::2] == 0).all()
    assert seen[2, :4].tolist() == [0, 255, 0, 0]
    Image.fromarray(np.full((4, 4), np.nan, "float32")).save(tmp_path / "b.tif")
    assert read_image(tmp_path / "b.tif").getextrema() == ((0, 0),) * 3


def test_black_and_white_can_be_given(tmp_path):
    Image.fromarray((RAMP * 16).astype("uint16")).save(tmp_path / "a.png")
    for low, high in ((0, 4080), (1000, 2000), (-500.5, 1e5)):
        expected = np.floor((RAMP * 16 - low).clip(0, high - low) * 255 / (high - low) + 0.5)
        seen = np.asarray(read_image(tmp_path / "a.png", value_range=(low, high)))[..., 0]
        assert np.abs(seen - expected).max() <= (low != 0)  # float32
    Image.fromarray(RAMP.astype("uint8")).save(tmp_path / "8.png")
    assert (np.asarray(read_image(tmp_path / "8.png", value_range=(0, 4095)))[..., 0] == RAMP).all()


@pytest.mark.parametrize("values, expected", [
    ([0, 200], (0, 255)), ([90, 220], (0, 255)), ([0, 600], (0, 1023)), ([0, 2500], (0, 4095)), ([0, 4e4], (0, 65535)),
    ([0, 0.9], (0, 1)), ([0, 0.3], (0, 0.3)), ([-1, 1], (-1, 1)), ([300, 500], (300, 500)), ([0, 1e6], (0, 1e6)),
    ([7, 7], (0, 255)), ([0.4, 0.4], (0, 1)), ([-3, -3], (-3, -2)), ([], (0, 1))])
def test_value_range(values, expected):
    """0 to the full scale if half of it is used, else the values."""
    values = np.repeat(np.asarray(values, "float32"), 1000)
    assert find_value_range(values) == pytest.approx(expected)


def test_one_value_in_a_thousand_is_no_range():
    values = np.append(np.linspace(-1024, 2000, 100_000), [-30_000] * 50 + [32_000] * 50).astype("float32")
    low, high = find_value_range(values)
    assert -1024 <= low < -1015 and 1990 < high <= 2000


# ---- bands and metadata ----

def test_a_fourth_band_of_a_tiff_is_not_transparency(tmp_path):
    """Near infrared, which GDAL marks as alpha; a PNG with the same values is composited on white."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:] = 40, 90, 60, 20
    for name, expected in (("a.tif", (40, 90, 60)), ("a.png", (238, 242, 240))):
        Image.fromarray(pixels).save(tmp_path / name)
        assert read_image(tmp_path / name).getpixel((3, 3)) == expected
        with Image.open(tmp_path / name) as image:
            assert infer.to_rgb(image).getpixel((3, 3)) == expected


def png_with(image, kind, content):
    """PNG of an image with one more chunk behind its header."""
    file = io.BytesIO()
    image.save(file, "PNG")
    png = file.getvalue()
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return png[:33] + chunk + png[33:]


def test_metadata_does_not_spoil_an_image(scene, tmp_path):
    large, exif = zlib.compress(bytes(5_000_000)), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "description"
    files = {f"{kind.decode()}.png": png_with(scene, kind, content) for kind, content in (
        (b"iCCP", b"icc\0\0" + large), (b"zTXt", b"XML:com.adobe.xmp\0\0" + large), (b"iTXt", b"x\0\1\0\0\0" + large),
        (b"tEXt", b"x\0" + bytes(2_000_000)), (b"eXIf", b"\x00\x08\x00\x02\x01\x12\x00\x03"), (b"eXIf", b""))}
    files |= {f"profile{i}.png": png_with(scene, b"iCCP", b"icc\0\0" + content)
              for i, content in enumerate((b"", b"not zlib"))}
    for kind in ("png", "jpg", "webp"):
        text = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01"  # the orientation as a text
        for i, broken in enumerate((exif.tobytes()[:20], text, b"Exif\0\0?")):
            scene.save(tmp_path / "broken", {"jpg": "JPEG"}.get(kind, kind.upper()), exif=broken, lossless=True,
                       icc_profile=b"no profile" * i)
            files[f"exif{i}.{kind}"] = (tmp_path / "broken").read_bytes()
    for orientation in (0, 9, 65535):
        exif[0x0112] = orientation
        for kind in ("png", "jpg", "webp", "tif"):
            scene.save(tmp_path / f"odd{orientation}.{kind}", exif=exif, lossless=True, icc_profile=b"no profile")
            files[f"odd{orientation}.{kind}"] = (tmp_path / f"odd{orientation}.{kind}").read_bytes()
    clean = {}
    for kind in ("png", "jpg", "webp", "tif"):
        scene.save(tmp_path / f"clean.{kind}", lossless=True)
        clean[kind] = read_image(tmp_path / f"clean.{kind}")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        expected = clean[name.rpartition(".")[2]]
        assert read_image(tmp_path / name).tobytes() == expected.tobytes(), name
        with Image.open(tmp_path / name) as image:
            whole = infer.prepare(image, dict(patch_size=2, image_size=None))
        assert whole.tobytes() == expected.crop((0, 0, 96, 60)).tobytes(), name


# ---- what is no file ----

def test_pipes_sockets_and_devices_are_not_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    os.mkfifo("pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        for path in ("pipe.png", "socket.png", "/dev/zero", "."):
            for read in (read_image, lambda path: read_mask(path, (8, 8))):
                with pytest.raises(ImageReadError, match=f"{path}: is not a regular file"):
                    read(path)


def test_bytes_of_a_file_inside_of_another(scene, tmp_path):
    """Decoded as the file is, and named in messages, which are one line."""
    file = io.BytesIO()
    scene.save(file, "JPEG")
    (tmp_path / "a.jpg").write_bytes(file.getvalue())
    for options in ({}, dict(reduction=lambda width, height: 2)):
        found = read_image("a.tar/a.jpg", content=file.getvalue(), **options)
        assert found.tobytes() == read_image(tmp_path / "a.jpg", **options).tobytes()
    for content in (b"", b"no image", file.getvalue()[:300]):
        with pytest.raises(ImageReadError, match="^a.tar/a.jpg: [^\n]+$"):
            read_image("a.tar/a.jpg", content=content)
    with pytest.raises(ImageReadError, match="^x: two lines$"), wrap_decode_errors("x"):
        raise ValueError("two\n  lines ")


# ---- any number of channels ----

def write_png(path, values):
    """A PNG of 16 bits, [H, W, C] with C of 1 to 4, which Pillow cannot write."""
    height, width, bands = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(
        ">I", zlib.crc32(kind + data)) for kind, data in chunks))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("dtype, full", [("uint8", 255), ("uint16", 65535), ("float32", 1), ("float64", 2.5)])
def test_every_format_keeps_channels_and_depth(tmp_path, channels, dtype, full):
    tifffile = pytest.importorskip("tifffile")
    values = np.random.RandomState(0).rand(channels, 21, 34) * full
    values = values.astype(dtype)
    expected, files = values.astype("float32") / full, []
    for name, array in (("first.npy", values), ("last.npy", values.transpose(1, 2, 0)), ("flat.npy", values[0])):
        if channels == 1 or array.ndim == 3:
            np.save(tmp_path / name, array)
            files.append(name)
    if channels > 1 or dtype != "float64":  # of one channel Pillow reads the rest
        for name, array, options in (("pages.tif", values, {}), ("planar.tiff", values, dict(planarconfig="separate")),
                                     ("pixels.tif", values.transpose(1, 2, 0), dict(planarconfig="contig")),
                                     ("volume.tif", values[:, None], dict(imagej=dtype != "float64"))):
            array, options = (array, options) if channels > 1 else (np.squeeze(array), {})
            tifffile.imwrite(tmp_path / name, array, photometric="minisblack", **options)
            files.append(name)
    if dtype == "uint16" and channels in (1, 3, 4):
        write_png(tmp_path / "deep.png", values.transpose(1, 2, 0))
        files.append("deep.png")
    if dtype == "uint8" and channels < 5:
        mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
        Image.fromarray(np.squeeze(values.transpose(1, 2, 0)), mode).save(tmp_path / "shallow.png")
        files.append("shallow.png")
    metadata = dict(channels=channels, value_range=[0, full])
    for name in files:
        x = read_image(tmp_path / name, value_range=(0, full), channels=channels)
        assert x.shape == (channels, 21, 34) and x.dtype == torch.float32, name
        np.testing.assert_allclose(x, expected, atol=2e-7, err_msg=name)
        np.testing.assert_array_equal(infer.read_channels(str(tmp_path / name), metadata), x, err_msg=name)
        half = read_image(tmp_path / name, lambda width, height: 2, value_range=(0, full), channels=channels)
        np.testing.assert_allclose(half[:, :10], expected[:, :20].reshape(channels, 10, 2, 17, 2).mean(axis=(2, 4)),
                                   atol=1e-6)
    wrong = channels + 1
    for name in files:
        with pytest.raises(ImageReadError, match=f"{name}: .* expected {wrong} channels, first or last"):
            read_image(tmp_path / name, channels=wrong)


def test_png_of_16_bits_with_alpha_only_is_refused(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((4, 5, 2), "uint16"))
    with pytest.raises(ImageReadError, match="convert it to TIFF"):
        read_image(tmp_path / "a.png", channels=2)
    with pytest.raises(ValueError, match="convert it to TIFF"):
        infer.read_channels(str(tmp_path / "a.png"), dict(channels=2))


def test_one_range_for_all_channels_and_missing_values(tmp_path):
    values = np.zeros((5, 8, 8), "float32")
    values[1], values[2, 0, :3] = 400, (np.nan, -3.4e38, np.inf)
    values[3] = np.linspace(-100, 300, 64).reshape(8, 8)
    np.save(tmp_path / "a.npy", values)
    x = read_image(tmp_path / "a.npy", value_range=(-100, 300), channels=5)
    assert x[0].unique() == 0.25 and x[1].unique() == 1 and x[2, 0, :4].tolist() == [0, 0, 1, 0.25]
    np.testing.assert_allclose(x[3].flatten(), np.linspace(0, 1, 64), atol=1e-6)
    found = find_common_range(["a.npy"], lambda name: None, lambda name: str(tmp_path / name), channels=5)
    assert found == pytest.approx((-99, 400), abs=4)
    assert ImageFolder(str(tmp_path), channels=5).value_range == found
    # JPEGs are not opened for it, and share the range of the model with dark files of another format
    assert find_common_range(["a.jpg"], channels=3) == (0, 255) and find_common_range(["a.jpg"]) is None
    (tmp_path / "b.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:500])
    np.save(tmp_path / "c.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "d.npy", np.zeros((5, 2, 300), "uint8"))
    np.save(tmp_path / "e.npy", np.zeros((5, 0, 0), "uint8"))
    for name, words in (("b", "b.npy: "), ("c", "Python objects"), ("d", "more than 100 times"), ("e", "0 x 0 pixels")):
        with pytest.raises(ImageReadError, match=words):
            read_image(tmp_path / f"{name}.npy", channels=5)


def test_channels_are_shown_as_gray_or_color():
    x = torch.linspace(0.2, 0.6, 4 * 20 * 30).view(4, 20, 30)
    gray, color = np.asarray(show_channels(x, [3])), np.asarray(show_channels(x, [2, 0, 3]))
    assert (gray == gray[..., :1]).all() and gray.min() == 0 and gray.max() == 255
    assert (color[..., 2] == gray[..., 0]).all() and np.array_equal(show_channels(x), show_channels(x, [0, 1, 2]))
    assert np.array_equal(show_channels(x[:2]), show_channels(x, [0]))
    image = Image.new("RGB", (3, 3))
    assert show_channels(image) is image
