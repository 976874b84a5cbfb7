"""Visualize attention, patch features, embeddings, training curves and crops.

    python visualize.py attention dog.jpg                       # maps and masks of the newest run's teacher
    python visualize.py attention /photos --ckpt dino_deitsmall8_pretrain.pth --image_size 480
    python visualize.py video in.mp4 out.mp4                    # or folders of frames
    python visualize.py features dog.jpg cat.jpg                # PCA of patch features as RGB
    python visualize.py embedding --data_path /photos           # t-SNE of a data set
    python visualize.py run runs/demo                           # curves of one run, or of several
    python visualize.py run runs/a-* runs/b-* --against seconds --knn 40   # and the time to 40% k-NN accuracy
    python visualize.py crops dog.jpg --flags runs/demo/flags.txt   # multi-crop augmentation with the flags of a run

Figures of a model are written beside its file (NAME.attention/, NAME.features.png, NAME.embedding.png) or to
--output_dir. `attention` and `video` also take an exported model, `--ckpt teacher.onnx`.
"""

import itertools
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from common import cli
from common.cli import fraction, nonnegative_int, positive_float, positive_int
from common.weights import CheckpointError, open_backbone, output_file, output_folder, resolve_image_size
from data import loaders
from data.datasets import DataError, ImageFolder, open_data
from data.images import ImageReadError, read_image
from data.video import VideoWriter, open_video
from evaluation.features import extract_features
from evaluation.masks import threshold_attention
from plotting.attention import open_attention
from plotting.curves import AXES, format_table, format_time_to_accuracy, plot_curves, read_log
from plotting.draw import COLORS, SIGNED, colorize, colorize_heads, components_to_rgb, highlight_mask, resize_to_fit
from plotting.embedding import class_colors, embed_2d, plot_scatter, plot_thumbnails, principal_components
from plotting.sheet import cell_side, contact_sheet

sheet_width = cli.bounded_number(int, lambda x: 200 <= x <= 20_000, "a number of pixels from 200 to 20000")


def parse_args(argv=None):
    parser = cli.build_parser("visualize.py", __doc__)
    tasks = cli.add_subcommands(parser, TASKS)
    for name in ("attention", "video", "features", "embedding"):
        cli.add_model_flags(tasks[name])
        cli.add_device_flags(tasks[name], workers=name == "embedding")
        tasks[name].add_argument("--image_size", type=positive_int, metavar="PIXELS", help=(
            "side of the center crop (default: the size the model was trained at)" if name == "embedding" else
            "shorter side (default: 480 for a model trained at 224, in proportion for others)"))
    for name in ("attention", "features", "crops"):
        add = tasks[name].add_argument
        add("images", nargs="+", metavar="IMAGE", help="image files, folders, or shapes[:PIXELS], four built-in images")
        add("--width", type=sheet_width, default=1000, metavar="PIXELS", help="width of a contact sheet")
    for name in ("attention", "features", "embedding"):
        tasks[name].add_argument("--output_dir", metavar="DIR", help="output folder (default: beside the model file)")

    add = tasks["attention"].add_argument
    add("--mass", type=fraction, default=0.6, metavar="X", help="share of the attention that a mask keeps")
    add("--separate", action="store_true", help="also write each map as an image of the input's size")
    add("--raw", action="store_true", help="also write the maps as NAME.npy, float32 [heads, rows, columns]")

    add = tasks["video"].add_argument
    add("input", metavar="IN", help="video file, or folder of frames")
    add("output", metavar="OUT", help="video file (.mp4, .mov, .mkv, .webm), or folder for frames")
    add("--layout", choices=["side", "overlay"], default="side", help="attention beside the frame or over it")
    add("--head", type=positive_int, metavar="N", help="attention head, from 1 (default: mean of all heads)")
    add("--fps", type=positive_float, default=25.0, metavar="X", help="frames per second, for a folder of frames")

    add = tasks["features"].add_argument
    add("--point", type=nonnegative_int, nargs=2, metavar=("X", "Y"),
        help="pixel of the first image; shows the cosine similarity of all patches to the patch there")

    add = tasks["embedding"].add_argument
    add("--data_path", default="shapes", help="data set as for train.py; its held-out part if it has one")
    add("--num_images", type=positive_int, default=2000, metavar="N", help="maximum number of images, a random subset")
    add("--batch_size_per_gpu", type=positive_int, default=128, metavar="B", help="images per forward pass")
    add("--seed", type=cli.seed, default=0, metavar="X", help="random seed of t-SNE")

    add = tasks["run"].add_argument
    add("runs", nargs="+", metavar="DIR", help="output folders of train.py, or logs; NAME-0 to NAME-9 are seeds")
    add("--against", choices=list(AXES), default="step", help="horizontal axis")
    add("--knn", type=positive_float, metavar="X", help="also print the time to a k-NN top-1 accuracy of X percent")
    add("--output", metavar="FILE", help="PNG, JPEG, PDF or SVG file (default: curves.png in the first folder)")

    add = tasks["crops"].add_argument
    add("--flags", metavar="FILE", help="recipe, or flags.txt of a run (default: the paper's crops)")
    add("--seed", type=cli.seed, default=0, metavar="X", help="random seed of the crops")
    add("--output_dir", default=".", metavar="DIR", help="output folder")
    return parser.parse_args(argv)


# ---- inputs and outputs ----

def list_images(name):
    """(name, function that decodes it) of each image of a file, a folder or shapes[:PIXELS]."""
    if os.path.isdir(name):
        return [(file, partial(read_image, os.path.join(name, file))) for file in ImageFolder(name).files]
    if name.partition(":")[0] == "shapes" and not os.path.exists(name):
        shapes = open_data(name).val
        return [(f"{name.replace(':', '_')}_{i}", lambda i=i: shapes[i][0]) for i in range(4)]
    return [(os.path.basename(name), partial(read_image, name))]


def iter_images(names, errors):
    """Yield (unique output name, RGB image); print images that cannot be read, and append the message to `errors`."""
    taken = []
    for name, read in sum(map(list_images, names), []):
        name = name.replace(os.sep, "_")[-60:]  # the name and an ending, in bytes, are within what file systems allow
        taken.append(f"{name}.{len(taken) + 1}" if name in taken else name)
        try:
            yield taken[-1], read()
        except ImageReadError as error:
            skip(error, errors)


def skip(error, errors):
    errors.append(str(error))
    tqdm.write(f"skipped {error}")


# ---- attention ----

def visualize_attention(args, errors):
    """Attention of the CLS token in the last block: map and mask of each head, mean, and overlay of all heads."""
    extract_attention, origin = open_attention(args)
    folder = output_folder(origin, args, "attention")
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in iter_images(args.images, errors):
        view, maps = extract_attention(image)
        draw_attention(name, view, maps, args.mass, args.width).save(folder / f"{name}.png")
        if args.raw:
            np.save(folder / f"{name}.npy", maps)
        for head, values in enumerate(maps if args.separate else [], start=1):
            colorize(values, view.size).save(folder / f"{name}.head{head}.png")
        tqdm.write(f"{name}: {len(maps)} heads of {maps.shape[1]} x {maps.shape[2]} patches -> {folder / name}.png")


def draw_attention(name, image, maps, mass, width):
    """Contact sheet of maps [heads, h, w]: image, mean of the heads, overlay of all; then map and mask of each head."""
    image = resize_to_fit(image, cell_side(width, 6))
    inside = [max(1, side - 6) for side in image.size]  # of a frame
    mean = maps.mean(axis=0)
    x = torch.from_numpy(np.stack([mean, *maps])).flatten(1)
    mean_mask, *masks = threshold_attention(x, mass).view(-1, *mean.shape).numpy()
    cells = [(image, name), (colorize(mean, image.size), f"mean, max {mean.max():.1%}"),
             (highlight_mask(image, mean_mask), "mask of the mean"),
             (colorize_heads(image, maps, np.stack(masks)), "masks of all heads"), None, None]
    for i, (values, mask, color) in enumerate(zip(maps, masks, itertools.cycle(COLORS)), start=1):
        framed = ImageOps.expand(colorize(values, inside), 3, color)
        cells += [(framed, f"head {i}, max {values.max():.1%}"), (highlight_mask(image, mask), f"mask of head {i}")]
    return contact_sheet(cells, 6, cell_side(width, 6), legend=(
        "Attention of the CLS token in the last block, per head and mean of all heads: black is 0, light yellow the "
        f"maximum of the map. A mask keeps {mass:.0%} of the attention. Frame colors match the overlay of all masks."))


def visualize_video(args, errors):
    """Attention of every frame of a video."""
    video = open_video(args.input)
    if os.path.exists(args.output) and os.path.samefile(args.input, args.output):
        raise DataError(f"{args.output}: is the input, choose another output")
    extract_attention, _ = open_attention(args)
    draw = draw_side_by_side if args.layout == "side" else draw_overlay
    written, top = 0, 0.0
    with VideoWriter(args.output, video.rate or args.fps) as writer, \
            tqdm(video.frames, total=video.count, unit="frame", disable=not sys.stderr.isatty()) as frames:
        for name, frame in frames:
            if isinstance(frame, str):
                skip(frame, errors)
                continue
            view, maps = extract_attention(frame)
            if args.head and args.head > len(maps):
                raise DataError(f"--head {args.head}: the model has {len(maps)} heads")
            values = maps[args.head - 1] if args.head else maps.mean(axis=0)
            top = max(values.max(), 0.95 * top)  # the color scale falls slowly, or the video would flicker
            writer.write(name, draw(view, values, top))
            written += 1
    print(f"{written} frames -> {args.output}")


def draw_side_by_side(frame, values, top):
    sheet = Image.new("RGB", (2 * frame.width, frame.height))
    sheet.paste(frame, (0, 0))
    sheet.paste(colorize(values, frame.size, high=top), (frame.width, 0))
    return sheet


def draw_overlay(frame, values, top):
    gray = ImageOps.grayscale(frame).convert("RGB")
    opacity = colorize(values, frame.size, high=top, scale=((0, 0, 0), (220, 220, 220)), smooth=True).convert("L")
    return Image.composite(colorize(values, frame.size, high=top, smooth=True), gray, opacity)


# ---- features ----

def visualize_features(args, errors):
    """Patch features: three principal components as RGB, and cosine similarity to one patch."""
    model, _, origin = open_backbone(args, needs="patch tokens")
    path = output_file(origin, args, "features.png")
    p = model.patch_size
    shorter_side = args.image_size or loaders.default_attention_size(model.grid[0] * p, p)
    rows, tokens, first_size = [], [], None
    for name, image in iter_images(args.images, errors):
        if args.point and errors and not rows:
            raise DataError(f"--point needs the first image, which cannot be read: {errors[0]}")
        first_size = first_size or image.size
        x = loaders.normalize(loaders.resize_to_patches(image, shorter_side, p))[None].to(args.device)
        with torch.no_grad():
            patches = model.get_intermediate_layers(x)[0][0, 1:].cpu()
        tokens.append(patches.unflatten(0, (x.shape[2] // p, -1)))  # [h, w, D]
        rows.append([(resize_to_fit(image, args.width // 2), name)])
    if not rows:
        return
    columns = 6 if len(rows) > 1 else 2 + bool(args.point)
    side = cell_side(args.width, columns)
    rows = [[(resize_to_fit(image, side), name)] for [(image, name)] in rows]
    components = principal_components(torch.cat([x.flatten(0, 1) for x in tokens]), 3).numpy()
    low, high = np.quantile(components, [0.01, 0.99], axis=0)
    for row, x in zip(rows, tokens):
        part, components = np.split(components, [x[..., 0].numel()])
        row.append((components_to_rgb(part.reshape(*x.shape[:2], 3), row[0][0].size, low, high), "PCA as RGB"))
    legend = "PCA as RGB: first three principal components of the patch features of all images."
    if args.point:
        add_similarity(rows, tokens, first_size, args.point)
        legend += " Cosine similarity to the patch in the yellow box: blue -1, white 0, red 1."
    contact_sheet(sum(rows, []), columns, side, legend).save(path)
    print(f"{len(rows)} images -> {path}")


def add_similarity(rows, tokens, size, point):
    """Append to each row its patches' cosine similarity to the patch at a point of the first image, and mark it."""
    (x, y), (width, height), (h, w) = point, size, tokens[0].shape[:2]
    if x >= width or y >= height:
        raise DataError(f"--point {x} {y}: the first image has {width} x {height} pixels")
    column, line = x * w // width, y * h // height
    for row, patches in zip(rows, tokens):
        cosine = F.cosine_similarity(patches, tokens[0][line, column], dim=-1)
        row.append((colorize(cosine.numpy(), row[0][0].size, -1.0, 1.0, SIGNED), "cosine similarity"))
    for image in (rows[0][0][0], rows[0][-1][0]):
        a, b = image.width / w, image.height / h
        box = [column * a - 2, line * b - 2, (column + 1) * a + 1, (line + 1) * b + 1]
        ImageDraw.Draw(image).rectangle(box, outline="yellow", width=2)


# ---- embedding ----

class IndexedDataset(torch.utils.data.Dataset):
    """index -> (image, (label, index)): the indices show which images extract_features left out as corrupt."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return image, (label, index)


def visualize_embedding(args, errors):
    """t-SNE of image features: a scatter plot in class colors, and the images at their points."""
    model, _, origin = open_backbone(args)
    size, data = resolve_image_size(args.image_size, model), open_data(args.data_path)
    images = loaders.random_subset(data.val if data.train_labeled is data.train else data.train, args.num_images)
    path = output_file(origin, args, "embedding.png")
    loader = loaders.build_eval_loader(IndexedDataset(images), size, args.batch_size_per_gpu, args.num_workers)
    features, labels_and_indices, corrupt = extract_features(model, loader, args.device, total=len(images))
    labels, indices = labels_and_indices.T
    points, method = embed_2d(features, args.seed)
    names = [str(name) for name in getattr(data.train, "classes", None) or range(labels.max() + 1)]
    colors = getattr(data.train, "colors", None) or class_colors(len(names))
    plot_scatter(points, labels, names, colors, f"{method} of {len(points)} images").savefig(path)
    thumbnails = path.with_suffix(".thumbnails.png")
    plot_thumbnails(points, labels, names, colors, lambda i: images[indices[i]][0]).save(thumbnails)
    print(f"{method} of {len(points)} images -> {path} and {thumbnails}")
    for message in corrupt:
        skip(message, errors)


# ---- training ----

def visualize_run(args, errors):
    """Training curves and final metrics of one or several runs."""
    logs = [Path(name) if name.endswith(".jsonl") else Path(name, "log.jsonl") for name in args.runs]
    runs = {str(log.parent if log.name == "log.jsonl" else log.with_suffix("")): read_log(log) for log in logs}
    output = args.output or logs[0].with_name("curves.png")
    if Path(output).suffix.lower() not in (".png", ".jpg", ".pdf", ".svg"):
        raise DataError(f"--output {output}: expected a file that ends with .png, .jpg, .pdf or .svg")
    print(format_table(runs))
    if args.knn:
        print(format_time_to_accuracy(runs, args.knn))
    plot_curves(runs, args.against).savefig(output)
    print(f"-> {output}")


def visualize_crops(args, errors):
    """Crops that multi-crop augmentation makes of an image, and their boxes in it."""
    parser = cli.build_parser("visualize.py", "")
    cli.add_crop_flags(parser)
    flags, _ = parser.parse_known_args([*([f"@{args.flags}"] if args.flags else []), "--views", "cpu"])
    cli.check_crop_flags(parser, flags)
    multicrop, side = loaders.build_multicrop(flags), cell_side(args.width, 4)
    os.makedirs(args.output_dir, exist_ok=True)
    for name, image in iter_images(args.images, errors):
        draw_crops(multicrop, image, (args.seed, name), side).save(Path(args.output_dir, f"{name}.crops.png"))
        tqdm.write(f"{2 + flags.local_crops_number} crops -> {Path(args.output_dir, name)}.crops.png")


def draw_crops(multicrop, image, key, side):
    """Contact sheet of the crops of one image; the global crops fill their cells, the local ones are in proportion."""
    views, boxes = multicrop.sample(*image.size, key), resize_to_fit(image, side)
    cells, scale = [], side / views[0].size
    for i, (view, x) in enumerate(zip(views, multicrop(image, key))):
        kind, number = ("global", i + 1) if i < 2 else ("local", i - 1)
        pixels = (x * multicrop.std + multicrop.mean).clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
        resampling = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
        crop = Image.fromarray(pixels).resize([max(1, round(view.size * scale))] * 2, resampling)
        cells.append((crop, f"{kind} {number}: {', '.join(describe_view(view, image))}"))
        box = [edge * boxes.width / image.width for edge in view.box]
        ImageDraw.Draw(boxes).rectangle(box, outline=COLORS[i < 2], width=2)
    return contact_sheet([(boxes, "boxes: global blue, local orange"), *cells[:2], None, *cells[2:]], 4, side, legend=(
        "Percent: area of the box relative to the image. Jitter: color jitter. Blur: sigma in pixels of the crop."))


def describe_view(view, image):
    """Area relative to the image, and the augmentations of a crop."""
    left, top, right, bottom = view.box
    yield f"{(right - left) * (bottom - top) / (image.width * image.height):.0%}"
    yield from [name for name, used in (("flip", view.flip), ("jitter", view.jitter), ("gray", view.grayscale)) if used]
    if view.blur:
        yield f"blur {view.blur:.1f}"
    if view.solarize:
        yield "solarize"


TASKS = {"attention": visualize_attention, "video": visualize_video, "features": visualize_features,
         "embedding": visualize_embedding, "run": visualize_run, "crops": visualize_crops}


def main(args):
    errors = []  # messages on images and frames that were skipped
    TASKS[args.task](args, errors)
    if errors:
        raise DataError(f"{len(errors)} skipped, the first: {errors[0]}")


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, CheckpointError)
