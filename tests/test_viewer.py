"""docs/viewer.html in Chromium: pixels equal those of Pillow, outputs those of ONNX Runtime."""

import base64
import functools
import http.server
import io
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import export
import infer
from common.weights import save_model
from evaluation.masks import threshold_attention
from vit import VisionTransformer

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


def skip_without(what):
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{what} is missing")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        skip_without("playwright")
    if not CHROMIUM:
        skip_without("Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def serve():
    """serve(folder): the address of a copy of docs/viewer.html in it."""
    servers = []

    def serve(folder):
        shutil.copy(ROOT / "docs" / "viewer.html", folder)
        handler = functools.partial(QuietHandler, directory=folder)
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/viewer.html"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def address(serve, tmp_path_factory):
    if not (ROOT / "node_modules" / "onnxruntime-web").is_dir():
        skip_without("node_modules/onnxruntime-web (npm install --no-save onnxruntime-web)")
    folder = tmp_path_factory.mktemp("page")
    (folder / "node_modules").symlink_to(ROOT / "node_modules")
    return serve(folder)


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport=dict(width=1000, height=800))
    page.set_default_timeout(20_000)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.wait_for_function("window.result")  # of the example
    yield page
    page.close()
    assert not errors


def export_onnx(model, *flags):
    export.main(export.parse_args(["--ckpt", str(model[1]), *flags]))
    return model[1].with_suffix(".onnx")


def save_image(scene, path, size, **options):
    """An image without repeats, with smooth and sharp parts."""
    image = scene.resize(size, Image.Resampling.BICUBIC)
    image.paste(scene, (size[0] // 3, size[1] // 4))
    image.save(path, **options)
    return path


def load(page, **files):
    """Give the page a model or an image; its result, as numpy arrays."""
    page.evaluate("window.result = undefined")
    for kind, path in files.items():
        page.set_input_files(f"#{kind}", path)
    page.wait_for_function("window.result || document.querySelector('#error').textContent")
    assert page.inner_text("#error") == ""
    return read_result(page)


def read_result(page):
    """The page's result; arrays travel as base64, which is much faster than as numbers."""
    result = page.evaluate("""() => {
        const text = view => Array.from(new Uint8Array(view.buffer, view.byteOffset, view.byteLength),
                                        byte => String.fromCharCode(byte)).join('');
        return Object.fromEntries(Object.entries(result).map(
            ([key, value]) => [key, ArrayBuffer.isView(value) ? btoa(text(value)) : value]))}""")
    arrays = {key: np.frombuffer(bytearray(base64.b64decode(result[key])), "uint8" if key == "pixels" else "float32")
              for key in ("pixels", "features", "attention", "similarity") if key in result}
    arrays["pixels"] = arrays["pixels"].reshape(result["height"], result["width"], 3)
    arrays["attention"] = arrays["attention"].reshape(result["dims"])
    return result | arrays


def check_percents(texts, shares):
    """Each text ends in its share, in percent: with three digits after the point below 1%, with one above."""
    assert len(texts) == len(shares)
    for text, share in zip(texts, shares):
        number = text.split()[-1]
        assert number[-1] == "%" and abs(float(number[:-1]) - 100 * share) <= (5.1e-2 if share >= 0.01 else 5.1e-4)


def expected(file, path):
    """View, features and attention by infer.py."""
    session, about = infer.open_model(str(file))
    with Image.open(path) as image:
        view = infer.prepare(image, about)
    features, attention = infer.infer(session, about, view)
    return np.asarray(view), features, attention


def read_canvas(page, index):
    """RGBA of the index-th canvas, [rows, cols, 4]."""
    width, height, values = page.evaluate("""index => {
        const canvas = document.querySelectorAll('canvas')[index], {width, height} = canvas;
        return [width, height, [...canvas.getContext('2d').getImageData(0, 0, width, height).data]]}""", index)
    return np.array(values).reshape(height, width, 4)


@pytest.mark.parametrize("flags, size", [
    (["--dynamic", "size"], (97, 61)), ([], (32, 32)), ([], (300, 211)), (["--image_size", "48", "64"], (101, 150)),
    (["--image_size", "64", "48"], (20, 33)),
    (["--normalize", "nhwc", "--dynamic", "size", "--heads", "mean"], (97, 61)),
    (["--normalize", "nchw", "--dynamic", "none", "--batch_size", "2"], (97, 61)),
    (["--dynamic", "size", "--precision", "fp16"], (64, 40))])
def test_results_equal_those_of_onnxruntime(page, model, scene, tmp_path, flags, size):
    file = export_onnx(model, "--patch_tokens", *flags)
    path = save_image(scene, tmp_path / "scene.png", size)
    pixels, features, attention = expected(file, path)
    result = load(page, model=file, image=path)
    assert np.array_equal(result["pixels"], pixels)
    assert result["dims"] == list(attention.shape)
    half = "fp16" in flags
    np.testing.assert_allclose(result["attention"], attention, atol=1e-3 if half else 1e-5)
    np.testing.assert_allclose(result["features"], features, atol=2e-2 if half else 1e-4)
    assert "teacher.onnx" in page.inner_text("#status") and "scene.png" in page.inner_text("#status")


def test_the_page_opens_with_an_example(browser, serve, tmp_path):
    """Without the runtime, from a file, and without a network."""
    serve(tmp_path)
    page, requests = browser.new_page(viewport=dict(width=1300, height=800)), []
    page.on("request", lambda request: requests.append(request.url))
    page.goto((tmp_path / "viewer.html").as_uri())
    page.wait_for_function("window.result")
    result = read_result(page)
    assert all(url.startswith("file:") or url == "data:," for url in requests)
    data = (tmp_path / "viewer.html").read_text().split('id="example-image">')[1].split("<")[0]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert result["pixels"].shape == (128, 128, 3) and np.abs(result["pixels"].astype(int) - pixels).max() <= 2
    maps = result["attention"]
    assert maps.shape == (8, 16, 16) and (maps.sum(axis=(1, 2)) < 1.01).all() and (maps.sum(axis=(1, 2)) > 0.5).all()
    assert page.locator("canvas").count() == 2 + 9
    for i, values in enumerate(maps):
        brightest, colors = np.unravel_index(values.argmax(), values.shape), read_canvas(page, 3 + i)
        assert tuple(colors[brightest]) == (252, 255, 164, 255) and colors[:, :, 3].min() == 255  # zeros too
    check_percents(page.locator("#small .scale").all_inner_texts()[1:], maps.max(axis=(1, 2)))
    assert result["title"].startswith("Example: ") and result["title"] in page.inner_text("#hint")
    assert "computed beforehand" in result["title"]
    page.locator("canvas").first.press("ArrowUp")
    assert result["marked"] - page.evaluate("result.marked") == 16
    page.close()


def test_figures_are_centered(page):
    for width in (1000, 1500, 500):
        page.set_viewport_size(dict(width=width, height=800))
        rows = {}
        for box in [figure.bounding_box() for figure in page.locator("figure").all()]:
            rows.setdefault(round(box["y"]), []).append((box["x"], box["x"] + box["width"]))
        assert len(rows) >= 3
        for boxes in rows.values():
            assert (min(boxes)[0] + max(boxes)[1]) / 2 == pytest.approx(page.evaluate("innerWidth") / 2, abs=10)


def test_large_images_are_downsampled(page, scene, tmp_path):
    network = VisionTransformer(img_size=32, patch_size=8, embed_dim=8, depth=1, num_heads=1)
    path = tmp_path / "one.safetensors"
    save_model(path, network.state_dict(), dict(
        backbone=dict(img_size=32, patch_size=8, embed_dim=8, depth=1, num_heads=1)))
    file = export_onnx((network, path), "--dynamic", "size")
    image = save_image(scene, tmp_path / "large.png", (1400, 1001))
    pixels, _, attention = expected(file, image)
    result = load(page, model=file, image=image)
    assert pixels.shape == (432, 600, 3) and np.array_equal(result["pixels"], pixels)
    np.testing.assert_allclose(result["attention"], attention, atol=1e-5)
    assert page.locator("#small .name").all_inner_texts() == ["head 1"]


def test_images_are_decoded_as_by_pillow(page, model, scene, tmp_path):
    file, turned, clear = export_onnx(model, "--dynamic", "size"), Image.Exif(), scene.convert("RGBA")
    turned[0x0112] = 6  # a quarter turn
    clear.putalpha(scene.convert("L"))
    load(page, model=file, image=save_image(scene, tmp_path / "scene.png", (64, 48)))
    for name, image, most, options in (
            ("photo.jpg", scene, 2, dict(quality=90)), ("turned.jpg", scene, 2, dict(quality=90, exif=turned)),
            ("photo.webp", scene, 2, dict(quality=90)), ("gray.png", scene.convert("L"), 0, {}),
            ("palette.png", scene.convert("P"), 0, {}), ("clear.png", clear, 1, {})):
        image.save(tmp_path / name, **options)
        pixels = expected(file, tmp_path / name)[0]
        result = load(page, image=tmp_path / name)
        assert result["pixels"].shape == pixels.shape == ((96, 56, 3) if name == "turned.jpg" else (56, 96, 3))
        assert np.abs(result["pixels"].astype(int) - pixels).max() <= most, name


def test_maps_and_similarities(page, model, scene, tmp_path):
    file = export_onnx(model, "--dynamic", "size", "--patch_tokens")
    path = save_image(scene, tmp_path / "scene.png", (96, 56))
    result = load(page, model=file, image=path)
    session, about = infer.open_model(str(file))
    image = (result["pixels"] / 255 - about["mean"]) / about["std"]
    tokens = session.run(["patch_tokens"], {"image": image.transpose(2, 0, 1)[None].astype("float32")})[0][0]
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    maps = [result["attention"].mean(axis=0), *result["attention"]]
    assert page.locator("canvas").count() == 2 + len(maps)
    assert np.array_equal(read_canvas(page, 0)[:, :, :3], result["pixels"])
    for i, values in enumerate(maps):
        colors = read_canvas(page, 2 + i)
        assert colors.shape == (7, 12, 4) and colors[:, :, 3].min() == 255
        brightest = np.unravel_index(values.argmax(), values.shape)
        assert tuple(colors[brightest]) == (252, 255, 164, 255)
        assert np.corrcoef(colors[:, :, :3].sum(axis=2).ravel(), values.ravel())[0, 1] > 0.9
    names = page.locator(".name").all_inner_texts()
    assert names[2:] == ["mean of heads", "head 1", "head 2", "head 3", "head 4"]
    scales = page.locator("#small .scale").all_inner_texts()
    assert all(text.split()[0] == "0%" for text in scales)
    check_percents(scales, [m.max() for m in maps])

    def check_marked(row, col, moved):
        index = int(row * 12 + col)
        page.wait_for_function("index => result.marked === index", arg=index)
        cosines = tokens @ tokens[index]
        np.testing.assert_allclose(read_result(page)["similarity"], cosines, atol=1e-5, err_msg=moved)
        heres = page.locator("#small .here").all_inner_texts()
        check_percents(heres, [m[row, col] for m in maps])
        red, _, blue = read_canvas(page, 1)[:, :, :3].reshape(-1, 3).astype(int).T
        assert ((red > blue) == (cosines > 0))[np.abs(cosines) > 0.05].all() and (cosines < -0.05).any()

    strongest = np.unravel_index(maps[0].argmax(), maps[0].shape)
    check_marked(*strongest, "at first")
    for canvas, row, col in ((0, 4, 9), (1, 6, 11), (4, 0, 2)):  # image, similarities and a head
        place = page.locator("canvas").nth(canvas)
        box = place.bounding_box()
        place.hover(position=dict(x=(col + 0.5) / 12 * box["width"], y=(row + 0.5) / 7 * box["height"]))
        check_marked(row, col, "by the pointer")
    place = page.locator("canvas").first
    for key in ("ArrowUp", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft"):  # the first would leave the image
        place.press(key)
    check_marked(1, 3, "by keys")
    mark, box = page.locator(".mark").first.bounding_box(), place.bounding_box()
    assert mark["x"] - box["x"] == pytest.approx(3 / 12 * box["width"], abs=1)
    assert mark["y"] - box["y"] == pytest.approx(1 / 7 * box["height"], abs=1)

    page.locator("#mass").fill("0.6")
    for i, values in enumerate(maps):
        kept = threshold_attention(torch.from_numpy(values.ravel()), 0.6).reshape(values.shape).numpy()
        assert np.array_equal(read_canvas(page, 2 + i)[:, :, 3] == 255, kept) and 0 < kept.sum() < kept.size


def test_a_new_model_and_a_new_image_replace_the_old(page, model, scene, tmp_path):
    first = save_image(scene, tmp_path / "a.png", (64, 48))
    second = save_image(scene, tmp_path / "b.png", (40, 72))
    file = export_onnx(model, "--dynamic", "size")
    page.set_input_files("#image", first)
    page.get_by_text("a.png is loaded; choose a model.").wait_for()
    assert load(page, model=file)["dims"] == [4, 6, 8]
    assert "export with --patch_tokens" in page.inner_text("#hint") and page.locator("#large canvas").count() == 1
    assert load(page, image=second)["dims"] == [4, 9, 5]
    export_onnx(model, "--heads", "mean", "--patch_tokens")
    assert load(page, model=file)["dims"] == [4, 4]
    assert page.locator("#small .name").all_inner_texts() == ["mean of heads"]
    assert "--patch_tokens" not in page.inner_text("#hint") and page.locator("#large canvas").count() == 2


def test_files_can_be_dropped(page, model, scene, tmp_path):
    file, path = export_onnx(model), save_image(scene, tmp_path / "scene.png", (64, 48))
    files = [[p.name, p.read_bytes().decode("latin1")] for p in (path, file)]
    assert page.evaluate("""files => {
        const data = new DataTransfer();
        for (const [name, text] of files) data.items.add(new File([Uint8Array.from(text, c => c.charCodeAt())], name));
        const drop = new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true});
        return !document.body.dispatchEvent(drop)}""", files), "the browser would open them"
    page.wait_for_function("window.result?.features")
    np.testing.assert_allclose(read_result(page)["attention"], expected(file, path)[2], atol=1e-5)


def test_errors_name_the_file_and_the_page_keeps_working(page, model, scene, tmp_path):
    good, image = export_onnx(model, "--dynamic", "size"), save_image(scene, tmp_path / "scene.png", (64, 48))
    bare = onnx.load(good)
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    unknown = onnx.load(good)
    unknown.graph.node[3].op_type = "Nothing"
    onnx.save(unknown, tmp_path / "unknown.onnx")
    other = onnx.load(good)
    next(item for item in other.metadata_props if item.key == "mean").value = "null"
    onnx.save(other, tmp_path / "other.onnx")
    (tmp_path / "text.onnx").write_text("a text of some length\n" * 50)
    (tmp_path / "cut.onnx").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "text.png").write_text("not an image")
    save_image(scene, tmp_path / "small.png", (7, 30))
    load(page, model=good, image=image)
    bad = [("model", name, "not an ONNX file of export.py: its metadata is missing")
           for name in ("bare.onnx", "text.onnx", "cut.onnx")]
    bad += [("model", "unknown.onnx", "Nothing"), ("model", "other.onnx", "other channels than red, green and blue"),
            ("image", "text.png", "not an image that this browser can decode"),
            ("image", "small.png", "7 x 30 pixels are less than a patch, 8 x 8")]
    for kind, name, words in bad:
        page.set_input_files(f"#{kind}", tmp_path / name)
        page.locator("#error", has_text=name).wait_for()
        error = page.inner_text("#error")
        assert error.startswith(f"{name}: ") and words in error and "\n" not in error
        status = "teacher.onnx is loaded; choose an image." if name == "small.png" else "on scene.png: 64 x 48 pixels"
        assert status in page.inner_text("#status")
    result = load(page, model=good, image=image)
    np.testing.assert_allclose(result["attention"], expected(good, image)[2], atol=1e-5)


@pytest.mark.parametrize("served, words", [
    (True, "onnxruntime-web is not beside it"), (False, "do not run it from a file")])
def test_a_missing_runtime_is_explained(browser, serve, tmp_path, scene, served, words):
    address = serve(tmp_path)
    page = browser.new_page()
    page.goto(address if served else (tmp_path / "viewer.html").as_uri())
    for _ in range(2):
        page.locator("#error", has_text="npm install --no-save onnxruntime-web and python -m http.server").wait_for()
        assert words in page.inner_text("#error")
        page.set_input_files("#image", save_image(scene, tmp_path / "scene.png", (64, 48)))
    page.close()


def test_the_layout_fits_the_window(page, model, scene, tmp_path):
    path = save_image(scene, tmp_path / ("a_rather_long_name_without_any_space_in_it" * 2 + ".png"), (64, 48))
    load(page, model=export_onnx(model, "--patch_tokens"), image=path)
    for width in (1000, 400):
        page.set_viewport_size(dict(width=width, height=800))
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wide = "[...document.querySelectorAll('p, div, label')].filter(e => e.scrollWidth > e.clientWidth)"
        assert page.evaluate(wide + ".map(e => e.textContent)") == []


def test_half_precision_in_a_browser_without_float16(page, model, scene, tmp_path):
    page.set_input_files("#image", save_image(scene, tmp_path / "scene.png", (64, 48)))
    page.evaluate("delete globalThis.Float16Array")
    page.set_input_files("#model", export_onnx(model, "--precision", "fp16"))
    page.locator("#error", has_text="teacher.onnx: takes float16, which this browser lacks").wait_for()
    assert load(page, model=export_onnx(model, "--precision", "mixed"))["dims"] == [4, 4, 4]
