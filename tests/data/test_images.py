import io
import os
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import infer
from data.images import ImageReadError, find_value_range, read_image, wrap_decode_errors
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
