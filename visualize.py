"""Pictures of what a backbone sees and of how it was trained.

    python visualize.py attention dog.jpg                       # the newest run's heads, masks and heads in colours
    python visualize.py attention /photos --ckpt dino_deitsmall8_pretrain.pth --image_size 480
    python visualize.py video in.mp4 out.mp4                    # or folders of frames
    python visualize.py features dog.jpg cat.jpg                # patch features as colours
    python visualize.py embedding --data_path /photos           # a map of a folder
    python visualize.py run runs/demo                           # the curves of a run, or of several
    python visualize.py run runs/a-* runs/b-* --against seconds --knn 40   # and who is at 40% when
    python visualize.py crops dog.jpg --flags runs/demo/flags.txt   # the views that a run makes of a picture

What is made of a model lies beside it, in NAME.attention and so on, unless --output_dir says otherwise. `attention` and
`video` also take an exported file, `--ckpt teacher.onnx`.
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
from common.checkpoint import check_writable
from common.cli import fraction, nonnegative_int, positive_int
from common.weights import CheckpointError, open_backbone, output_file, output_folder, resolve_image_size
from data.datasets import DataError, ImageFolder, open_data
from data.images import ImageReadError, read_image
from data.loaders import (
    build_eval_loader,
    build_multicrop,
    default_attention_size,
    normalize,
    random_subset,
    resize_to_patches,
)
from data.video import VideoWriter, open_video
from evaluation.features import extract_features
from evaluation.masks import threshold_attention
from plotting.attention import open_attention
from plotting.curves import AXES, format_table, format_time_to_accuracy, plot_curves, read_log
from plotting.draw import COLORS, SIGNED, colorize, colorize_heads, components_to_rgb, highlight_mask, resize_to_fit
from plotting.embedding import class_colors, embed_2d, plot_scatter, plot_thumbnails, principal_components
from plotting.sheet import cell_side, contact_sheet


def parse_args(argv=None):
    parser = cli.build_parser("visualize.py", __doc__)
    tasks = cli.add_subcommands(parser, TASKS)
    for name in ("attention", "video", "features", "embedding"):
        cli.add_model_flags(tasks[name])
        tasks[name].add_argument("--image_size", type=positive_int, metavar="PIXELS", help=(
            "side of the square that is looked at (default: the size the model was trained at)" if name == "embedding"
            else "shorter side of what is looked at (default: 480 for a model trained at 224, and in proportion)"))
        cli.add_device_flags(tasks[name], workers=name == "embedding")
    for name in ("attention", "features"):
        tasks[name].add_argument("pictures", nargs="+", metavar="PICTURE",
                                 help="pictures, folders of them, or shapes[:PIXELS], the first four built-in ones")
    for name in ("attention", "features", "crops"):
        tasks[name].add_argument("--width", type=sheet_width, default=1000, metavar="PIXELS",
                                 help="of a sheet (default: 1000)")
    for name in ("attention", "features", "embedding", "crops"):
        tasks[name].add_argument("--output_dir", metavar="DIR", help="folder for what is written (default: " + (
            "the current one)" if name == "crops" else "that of the model file)" if name == "embedding" else
            f"NAME.{name} beside the model file)"))

    add = tasks["attention"].add_argument
    add("--mass", type=fraction, default=0.6, metavar="X", help="share of the attention that a mask keeps (default: 0.6)")
    add("--separate", action="store_true", help="also each map by itself, in the picture's size")
    add("--raw", action="store_true", help="also the numbers, NAME.npy, float32 [heads, rows, columns]")

    add = tasks["video"].add_argument
    add("input", metavar="IN", help="video file, or folder of frames")
    add("output", metavar="OUT", help="video file (.mp4, .mov, .mkv, .webm), or folder for frames")
    add("--layout", choices=["side", "overlay"], default="side",
        help="attention beside the frame or over it (default: side)")
    add("--head", type=positive_int, metavar="N", help="which head, from 1 on (default: their mean)")
    add("--fps", type=fps, default=25.0, metavar="X",
        help="frames a second where frames come from a folder (default: 25)")

    add = tasks["features"].add_argument
    add("--point", type=nonnegative_int, nargs=2, metavar=("X", "Y"),
        help="pixel of the first picture, to show how similar each patch of all pictures is to the one there")

    add = tasks["embedding"].add_argument
    add("--data_path", default="shapes", help="pictures, named as for train.py; where a part is held out, "
        "that part (default: shapes)")
    add("--pictures", type=positive_int, default=2000, metavar="N", help="at most so many, drawn at random (default: 2000)")
    add("--batch_size_per_gpu", type=positive_int, default=128, metavar="B", help="pictures a pass (default: 128)")
    add("--seed", type=cli.seed, default=0, metavar="X", help="of t-SNE (default: 0)")

    add = tasks["run"].add_argument
    add("runs", nargs="+", metavar="DIR", help="output folders of train.py, or their logs; those that are named alike "
        "but for -0 to -9 at the end share a colour, a mean and a spread")
    add("--against", choices=list(AXES), default="step", help="what the curves are drawn against (default: step)")
    add("--knn", type=percent, metavar="X", help="say when each run first had a k-NN top-1 of X percent")
    add("--output", metavar="FILE", help="picture, or PDF or SVG (default: curves.png in the first folder)")

    add = tasks["crops"].add_argument
    add("picture", metavar="PICTURE", help="a picture, or shapes[:PIXELS]")
    add("--flags", metavar="FILE", help="recipe, or flags.txt of a run, whose views are shown (default: the paper's)")
    add("--seed", type=cli.seed, default=0, metavar="X", help="of the views (default: 0)")
    return parser.parse_args(argv)


percent = cli.bounded_number(float, lambda x: 0 < x <= 100, "a number of percent above 0, to 100")
sheet_width = cli.bounded_number(int, lambda x: 200 <= x <= 20_000, "a number of pixels from 200 to 20000")
fps = cli.bounded_number(float, lambda x: 0.1 <= x <= 1000, "a number of frames a second from 0.1 to 1000")


# ---- pictures in ----

def entries_of(name):
    """(name, function that opens it) of each picture that a file, a folder or shapes[:PIXELS] is."""
    if os.path.isdir(name):
        return [(file, partial(read_image, os.path.join(name, file))) for file in ImageFolder(name).files]
    if name.partition(":")[0] == "shapes" and not os.path.exists(name):
        shapes = open_data(name).val
        return [(f"{name.replace(':', '_')}_{i}", lambda i=i: shapes[i][0]) for i in range(4)]
    return [(os.path.basename(name), partial(read_image, name))]


def pictures_of(names, failed):
    """(name, RGB image) one by one; messages on what cannot be used are said and added to `failed`."""
    def attempt(make):
        try:
            return make()
        except (DataError, ImageReadError) as error:
            failed.append(str(error))
            tqdm.write(f"skipped {error}")

    for name in names:
        for shown, open_picture in attempt(partial(entries_of, name)) or ():
            picture = attempt(open_picture)
            if picture:
                yield shown, picture


def require_all(failed):
    if failed:
        raise DataError(f"{len(failed)} could not be used; the first: {failed[0]}")


def file_name(name, taken):
    """A name to write a picture under: folders become part of it, and one that is taken gets a number."""
    base = os.fsencode(name.replace(os.sep, "_"))[-150:].decode(errors="ignore")
    name = next(x for x in itertools.chain([base], (f"{base}.{i}" for i in itertools.count(2))) if x not in taken)
    taken.add(name)
    return name


def new_folder(origin, args, ending):
    folder = output_folder(origin, args, ending)
    folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder)
    return folder


# ---- attention ----

def attention(args):
    """Attention of the last block: a map for each head, their mean, masks, and the heads in colours."""
    look, origin = open_attention(args)
    output = new_folder(origin, args, "attention")
    failed, taken = [], set()
    for name, picture in pictures_of(args.pictures, failed):
        name = file_name(name, taken)
        seen, maps = look(picture)
        attention_sheet(name, seen, maps, args.mass, args.width).save(output / f"{name}.png")
        if args.raw:
            np.save(output / f"{name}.npy", maps)
        for head, values in enumerate(maps if args.separate else [], start=1):
            colorize(values, seen.size).save(output / f"{name}.head{head}.png")
        tqdm.write(f"{name}: {len(maps)} heads of {maps.shape[1]} x {maps.shape[2]} patches -> {output / name}.png")
    require_all(failed)


def attention_sheet(name, picture, maps, mass, width):
    """One page: the picture, the mean of maps [heads, h, w], what is kept of it, all heads in colours; each head."""
    heads, h, w = maps.shape
    columns = min((4, 5, 6), key=lambda columns: -(-heads // columns))
    side = cell_side(width, columns)
    masks = threshold_attention(torch.from_numpy(maps).flatten(1), mass).view(heads, h, w).numpy()
    mean = maps.mean(axis=0)
    kept = threshold_attention(torch.from_numpy(mean).flatten(), mass).view(h, w).numpy()
    shown = resize_to_fit(picture, side)
    cells = [(shown, name), (colorize(mean, shown.size), f"mean of heads, to {mean.max():.1%}"),
             (highlight_mask(shown, kept), f"{mass:.0%} of the mean"),
             (colorize_heads(shown, maps, masks), f"{mass:.0%} of each, in colour")]
    cells += [None] * (columns - len(cells))
    inside = max(1, shown.width - 6), max(1, shown.height - 6)
    for first in range(0, heads, columns):
        row = range(first, min(first + columns, heads))
        blank = [None] * (columns - len(row))
        cells += [(ImageOps.expand(colorize(maps[i], inside), 3, COLORS[i % len(COLORS)]),
                   f"head {i + 1}, to {maps[i].max():.1%}") for i in row] + blank
        cells += [(highlight_mask(shown, masks[i]), f"{mass:.0%} of head {i + 1}") for i in row] + blank
    return contact_sheet(cells, columns, side)


def video(args):
    """The attention of every frame, as a video; only one frame is held at a time."""
    clip = open_video(args.input)
    if os.path.exists(args.output) and os.path.samefile(args.input, args.output):
        raise DataError(f"{args.output}: is the input")
    look, _ = open_attention(args)
    failed, drawn, top = [], 0, 0.0
    with VideoWriter(args.output, clip.rate or args.fps) as writer, \
            tqdm(clip.frames, total=clip.count, unit="frame", disable=not sys.stderr.isatty()) as frames:
        for name, frame in frames:
            if isinstance(frame, str):
                failed.append(frame)
                tqdm.write(f"skipped {frame}")
                continue
            seen, maps = look(frame)
            if args.head and args.head > len(maps):
                raise DataError(f"--head {args.head}: there are {len(maps)}")
            values = maps[args.head - 1] if args.head else maps.mean(axis=0)
            top = max(values.max(), 0.95 * top)  # the scale follows the brightest slowly, or it would flicker
            writer.write(name, (side_by_side if args.layout == "side" else overlaid)(seen, values, top))
            drawn += 1
    print(f"{drawn} frames -> {args.output}")
    if not drawn and not failed:
        raise DataError(f"{args.input}: no frame in it")
    require_all(failed)


def side_by_side(frame, values, top):
    sheet = Image.new("RGB", (2 * frame.width, frame.height))
    sheet.paste(frame, (0, 0))
    sheet.paste(colorize(values, frame.size, high=top), (frame.width, 0))
    return sheet


def overlaid(frame, values, top):
    grey = ImageOps.grayscale(frame).convert("RGB")
    cover = colorize(values, frame.size, high=top, scale=((0, 0, 0), (220, 220, 220)), smooth=True).convert("L")
    return Image.composite(colorize(values, frame.size, high=top, smooth=True), grey, cover)


# ---- features ----

def features(args):
    """Patch features as colours: three principal components of all pictures together; similarity to one patch."""
    model, _, origin = open_backbone(args, needs="patch tokens")
    path = new_folder(origin, args, "features") / "features.png"
    p = model.patch_size
    shorter = args.image_size or default_attention_size(model.grid[0] * p, p)
    pictures, tokens, failed, first_size = [], [], [], None
    for name, picture in pictures_of(args.pictures, failed):
        if args.point and failed and not pictures:
            raise DataError(f"--point lies in the first picture, which cannot be used: {failed[0]}")
        first_size = first_size or picture.size
        pictures.append((resize_to_fit(picture, args.width // 2), name))
        x = normalize(resize_to_patches(picture, shorter, p))[None].to(args.device)
        with torch.no_grad():
            patches = model.get_intermediate_layers(x)[0][0, 1:].cpu()
        tokens.append(patches.unflatten(0, (x.shape[2] // p, -1)))  # [h, w, D]
    if not pictures:
        require_all(failed)
    columns = 6 if len(pictures) > 1 else 2 + bool(args.point)
    side = cell_side(args.width, columns)
    rows = [[(resize_to_fit(picture, side), name)] for picture, name in pictures]
    components = principal_components(torch.cat([x.flatten(0, 1) for x in tokens]), 3).numpy()
    low, high = np.quantile(components, [0.01, 0.99], axis=0)
    for row, x in zip(rows, tokens):
        part, components = np.split(components, [x[..., 0].numel()])
        row.append((components_to_rgb(part.reshape(*x.shape[:2], 3), row[0][0].size, low, high), "three components"))
    if args.point:
        show_similarity(rows, tokens, first_size, args.point)
    contact_sheet(sum(rows, []), columns, side).save(path)
    print(f"{len(rows)} pictures -> {path}")
    require_all(failed)


def show_similarity(rows, tokens, size, point):
    """Mark the patch at a point of the first picture, and add to each row how similar its patches are to that one."""
    (x, y), (width, height), (h, w) = point, size, tokens[0].shape[:2]
    if x >= width or y >= height:
        raise DataError(f"--point {x} {y}: the first picture has {width} x {height} pixels")
    column, line = x * w // width, y * h // height
    for row, patches in zip(rows, tokens):
        cosine = F.cosine_similarity(patches, tokens[0][line, column], dim=-1)
        row.append((colorize(cosine.numpy(), row[0][0].size, -1.0, 1.0, SIGNED), "cosine, blue -1 to red 1"))
    for image in (rows[0][0][0], rows[0][-1][0]):
        a, b = image.width / w, image.height / h
        box = [column * a - 2, line * b - 2, (column + 1) * a + 1, (line + 1) * b + 1]
        ImageDraw.Draw(image).rectangle(box, outline="yellow", width=2)


# ---- a folder ----

class Numbered(torch.utils.data.Dataset):
    """(picture, (label, its number))."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image, label = self.images[i]
        return image, (label, i)


def embedding(args):
    """A map of pictures by their features, t-SNE: points in the colours of the classes, and the pictures themselves."""
    model, _, origin = open_backbone(args)
    size, data = resolve_image_size(args.image_size, model), open_data(args.data_path)
    images = random_subset(data.val if data.train_labeled is data.train else data.train, args.pictures)
    path = output_file(origin, args, "embedding.png")
    loader = build_eval_loader(Numbered(images), size, args.batch_size_per_gpu, args.num_workers)
    x, found, unreadable = extract_features(model, loader, args.device, total=len(images))
    labels, numbers = found.T
    points, method = embed_2d(x, args.seed)
    names = [str(name) for name in getattr(data.train, "classes", None) or range(labels.max() + 1)]
    shades = getattr(data.train, "colors", None) or class_colors(len(names))
    plot_scatter(points, labels, names, shades, f"{method} of {len(x)} pictures").savefig(path)
    thumbs = path.with_suffix(".thumbnails.png")
    plot_thumbnails(points, labels, shades, lambda i: images[numbers[i]][0]).save(thumbs)
    print(f"{method} of {len(x)} pictures -> {path} and {thumbs}")
    for message in unreadable:
        tqdm.write(f"skipped {message}")
    require_all(unreadable)


# ---- training ----

def run(args):
    """The curves of a run, or of several, on one page, and how they ended."""
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


def crops(args):
    """What the networks see: the views that training makes of a picture, and where they come from."""
    parser = cli.build_parser("visualize.py", "")
    cli.add_crop_flags(parser)
    file = [f"@{args.flags}"] if args.flags else []
    flags, _ = parser.parse_known_args([*file, "--views", "cpu"])
    cli.check_crop_flags(parser, flags)
    multicrop = build_multicrop(flags)
    if os.path.isdir(args.picture):
        raise DataError(f"{args.picture}: is a folder, expected one picture")
    name, open_picture = entries_of(args.picture)[0]
    picture = open_picture()
    key, side = (args.seed, name), cell_side(args.width, 4)
    plan = multicrop.sample(*picture.size, key)
    pictures, numbers = [], {}
    marked, scale = resize_to_fit(picture, side), side / plan[0].size
    for i, (view, x) in enumerate(zip(plan, multicrop(picture, key))):
        kind = "global" if i < 2 else "local"
        numbers[kind] = numbers.get(kind, 0) + 1
        pixels = (x * multicrop.std + multicrop.mean).clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
        how = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
        pictures.append((Image.fromarray(pixels).resize([max(1, round(view.size * scale))] * 2, how),
                         f"{kind} {numbers[kind]}: {', '.join(told(view, picture))}"))
        box = [edge * marked.width / picture.width for edge in view.box]
        ImageDraw.Draw(marked).rectangle(box, outline=COLORS[i < 2], width=2)
    pictures[2:2] = [None]
    output = Path(args.output_dir or ".", f"{name}.crops.png")
    output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet([(marked, "boxes: blue global, orange local"), *pictures], 4, side).save(output)
    print(f"{len(plan)} views -> {output}")


def told(view, picture):
    """What was done for a view, in words."""
    left, top, right, bottom = view.box
    yield f"{(right - left) * (bottom - top) / (picture.width * picture.height):.0%}"
    yield from [word for word, done in (("flip", view.flip), ("jitter", view.jitter), ("grey", view.grayscale)) if done]
    if view.blur:
        yield f"blur {view.blur:.1f}"
    if view.solarize:
        yield "solarized"


TASKS = {"attention": attention, "video": video, "features": features, "embedding": embedding, "run": run,
         "crops": crops}


def main(args):
    TASKS[args.task](args)


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, CheckpointError)
