"""Visualize attention, patch features, embeddings, training curves and crops.

    python visualize.py attention dog.jpg                       # maps and masks of the newest run's teacher
    python visualize.py attention /photos --ckpt dino_deitsmall8_pretrain.pth --image_size 480
    python visualize.py video in.mp4 out.mp4                    # or folders of frames
    python visualize.py features dog.jpg cat.jpg                # PCA of patch features as RGB
    python visualize.py embedding --data_path /photos           # t-SNE of a data set
    python visualize.py embedding --run runs/demo               # the same over the saved epochs of a run, animated
    python visualize.py run runs/demo                           # curves of one run, or of several
    python visualize.py run runs/a-* runs/b-* --against seconds --knn 40   # and the time to 40% k-NN accuracy
    python visualize.py crops dog.jpg --flags runs/demo/flags.txt   # multi-crop augmentation with the flags of a run

Figures of a model are written beside its file (NAME.attention/, NAME.features.png, NAME.embedding.png, .gif) or
to --output_dir. `attention` and `video` also take an exported model, `--ckpt teacher.onnx`.
"""

import common  # noqa: F401 (first: it checks the version of Python)

# isort: split
import functools
import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import cli
from common.checkpoint import CheckpointError, load_checkpoint
from common.files import create_folder, number_name
from common.paths import output_file, output_folder
from common.weights import open_backbone, resolve_image_size
from data import loaders
from data.datasets import DataError, is_shapes, is_source, open_data, open_data_of_model, open_images
from data.images import ImageReadError, read_image, show_channels
from data.video import WRITABLE, VideoWriter, open_video
from evaluation.features import extract_features
from evaluation.masks import mask_mean_and_heads
from plotting import attention, curves, draw, embedding, sheet

sheet_width = cli.bounded_number(int, lambda x: 200 <= x <= 20_000, "a number of pixels from 200 to 20000")


def parse_args(argv=None):
    parser = cli.build_parser("visualize.py", __doc__)
    attention, video, features, embedding, run, crops = cli.add_subcommands(parser, TASKS).values()
    for task in (attention, video, features, embedding):
        cli.add_model_flags(task, workers=task is embedding, output_dir=task is not video)
        size = "center crop (default: as trained)" if task is embedding else "shorter side (default: 480/224 of that)"
        task.add_argument("--image_size", type=cli.image_side, help=size)
    for task in (attention, features, embedding, crops):
        cli.add_show_channels_flag(task)
    for task in (attention, features, crops):
        task.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders, shards, or shapes[:PIXELS]")
        cli.add_cache_flag(task)
        task.add_argument("--width", type=sheet_width, default=1000, help="width of a contact sheet in pixels")

    attention.add_argument("--mass", type=cli.fraction, default=0.6, help="share of the attention that a mask keeps")
    attention.add_argument("--separate", action="store_true", help="also write each map as an image of input size")
    attention.add_argument("--raw", action="store_true", help="also write the maps as NAME.npy, [heads, rows, columns]")

    video.add_argument("input", metavar="IN", help="video file, or folder of frames")
    video.add_argument("output", metavar="OUT", help="video file (.mp4, .mov, .mkv, .webm), or folder")
    video.add_argument("--layout", choices=["side", "overlay"], default="side", help="beside the frame or over it")
    video.add_argument("--head", type=cli.positive_int, help="attention head, from 1 (default: mean of all heads)")
    video.add_argument("--fps", type=cli.positive_float, default=25.0, help="frames per second, for a folder of frames")

    features.add_argument("--point", type=cli.nonnegative_int, nargs=2, help="x, y: similarity to the patch there")

    cli.add_data_flags(embedding, None, "as for train.py, the held-out part if there is one (default: the data of the "
                       "newest run, or shapes)")
    embedding.add_argument("--num_images", type=cli.positive_int, default=2000, help="size of a random subset")
    embedding.add_argument("--batch_size_per_gpu", type=cli.positive_int, default=128, help="images per forward pass")
    embedding.add_argument("--seed", type=cli.seed, default=0, help="random seed of t-SNE")
    embedding.add_argument("--run", metavar="DIR", help="animation over the checkpoints of a run, see --saveckp_freq")
    embedding.add_argument("--output", metavar="FILE", help="of --run: .gif, or a video: .mp4, .mov, .mkv, .webm "
                           "(default: teacher.embedding.gif)")

    run.add_argument("runs", nargs="+", metavar="DIR", help="folders of train.py, or logs; NAME-0 to NAME-9 are seeds")
    run.add_argument("--against", choices=list(curves.AXES), default="step", help="horizontal axis")
    run.add_argument("--knn", type=cli.positive_float, help="also print the time to a k-NN top-1 accuracy of X percent")
    run.add_argument("--output", metavar="FILE", help=".png, .jpg, .pdf or .svg (default: curves.png in first DIR)")

    crops.add_argument("--flags", metavar="FILE", help="recipe, or flags.txt of a run (default: the paper's crops)")
    crops.add_argument("--seed", type=cli.seed, default=0, help="random seed of the crops")
    crops.add_argument("--output_dir", default=".", metavar="DIR", help="output folder")
    args = parser.parse_args(argv)
    cli.check_show_channels(parser, args)
    if args.task == "embedding" and args.run and (args.ckpt or args.untrained):
        parser.error("--run takes the checkpoints of a run: leave out --ckpt and --untrained")
    if args.task == "embedding" and args.output and not args.run:
        parser.error(f"--output {args.output} is for --run, set --output_dir")
    return args


# ---- images ----

def expand_images(name, output_dir, cache_dir, options):
    """(name, function that decodes it) of each image of a file, a folder, shards, or of four of shapes[:PIXELS]."""
    if os.path.isdir(name) or is_source(name):
        images = open_images([name], output_dir, cache_dir, **options)
        return [(images.key(i), lambda i=i: images[i][0]) for i in range(len(images))]
    if is_shapes(name) and not options.get("channels"):
        shapes = open_data(name).val
        return [(f"{name.replace(':', '_')}_{i}", lambda i=i: shapes[i][0]) for i in range(4)]
    return [(os.path.basename(name), lambda: read_image(name, **options))]


def iter_readable_images(args, errors, output_dir, **options):
    """Yield (unique output name, image, RGB image of it); append a message on each that cannot be read to `errors`.

    Args:
        options: value_range and channels, see `read_image`.
    """
    taken = []
    for name, read in sum((expand_images(name, output_dir, args.cache_dir, options) for name in args.images), []):
        name = number_name(re.sub(r"^(\.\._)+", "", name.replace(os.sep, "_")), taken)  # lists name files elsewhere
        try:
            image = read()
            yield name, image, show_channels(image, args.show_channels)
        except ImageReadError as error:
            errors.append(str(error))


# ---- attention ----

def visualize_attention(args, errors):
    """Attention of the CLS token in the last block: map and mask of each head, mean, and overlay of all heads."""
    extract_attention, origin = attention.open_attention(args)
    folder = output_folder(origin, args, "attention")
    create_folder(folder)
    noted = False
    options = dict(value_range=origin["value_range"], channels=origin["channels"])
    for name, image, shown in iter_readable_images(args, errors, folder, **options):
        view, maps = extract_attention(image)
        noted = noted or attention.note_coarse_map(name, shown, maps.shape[1:], origin["patch_size"],
                                                   "set" if view is image else "export with")
        view = show_channels(view, args.show_channels)
        masks = mask_mean_and_heads(torch.from_numpy(maps), args.mass).numpy()
        drawn = sheet.draw_attention_sheet(name, view, maps, masks, args.mass, args.width, origin["model"])
        path = folder / f"{name}.attention.png"
        drawn.save(path)
        if args.raw:
            np.save(folder / f"{name}.npy", maps)
        for head, values in enumerate(maps if args.separate else [], start=1):
            draw.colorize(values, view.size).save(folder / f"{name}.head{head}.attention.png")
        print(f"{name}: {len(maps)} heads of {maps.shape[2]} x {maps.shape[1]} patches -> {path}")


def visualize_video(args, errors):
    """Attention of every frame of a video."""
    output = Path(args.output).resolve()
    if Path(args.input).resolve() in (output, *output.parents):
        raise DataError(f"{args.output}: is the input or lies in it, choose another output")
    video = open_video(args.input)
    extract_attention, origin = attention.open_attention(args, rgb_only=True)
    draw_frame = draw.draw_side_by_side if args.layout == "side" else draw.draw_overlay
    written, top = 0, 0.0
    with VideoWriter(args.output, video.rate or args.fps) as writer:
        for name, frame in tqdm(video.frames, total=video.count, unit="frame", disable=None):
            if isinstance(frame, str):
                errors.append(frame)
                continue
            view, maps = extract_attention(frame)
            if args.head and args.head > len(maps):
                raise DataError(f"--head {args.head}: the model has {len(maps)} heads")
            if not written:
                attention.note_coarse_map("each frame", frame, maps.shape[1:], origin["patch_size"],
                                          "set" if view is frame else "export with")
            values = maps[args.head - 1] if args.head else maps.mean(axis=0)
            top = max(values.max(), 0.95 * top)  # the color scale falls slowly, or the video would flicker
            writer.write(name, draw_frame(view, values, top))
            written += 1
    print(f"{written} frames -> {args.output}")


# ---- features ----

@torch.no_grad()
def visualize_features(args, errors):
    """Patch features: three principal components as RGB, and cosine similarity to one patch."""
    model, info, origin = open_backbone(args, needs="patch tokens", rgb_only=False)
    path, p = output_file(origin, args, "features.png"), model.patch_size
    shorter_side = args.image_size or loaders.default_attention_size(model.grid[0] * p, p)
    images, tokens, patch, noted = [], [], None, False
    options = dict(value_range=origin["value_range"], channels=info["channels"])
    for name, image, shown in iter_readable_images(args, errors, path.parent, **options):
        if args.point and not images and errors:
            raise DataError(f"--point lies in the first image, which cannot be read: {errors[0]}")
        x = loaders.normalize(loaders.resize_to_patches(image, shorter_side, p), info["mean"], info["std"])
        x = x[None].to(args.device)
        tokens.append(model.get_intermediate_layers(x)[0][0, 1:].unflatten(0, (x.shape[2] // p, -1)).cpu())  # [h, w, D]
        noted = noted or attention.note_coarse_map(name, shown, tokens[-1].shape, p)
        if args.point and not images:
            (column, row), (h, w) = args.point, tokens[0].shape[:2]
            if column >= shown.width or row >= shown.height:
                raise DataError(f"--point {column} {row}: the first image has {shown.width} x {shown.height} pixels")
            patch = row * h // shown.height, column * w // shown.width
        images.append((sheet.resize_to_width(shown, args.width // 2), name))
    if images:
        model = sheet.describe_model(origin, info, p)
        sheet.draw_features(images, tokens, args.width, model, patch).save(path)
        print(f"{len(images)} images -> {path}")


def visualize_embedding(args, errors):
    """t-SNE of image features: a scatter plot in class colors, and the images at their points."""
    if args.run:
        return animate_embedding(args, errors)
    model, info, origin = open_backbone(args, rgb_only=False)
    size = resolve_image_size(args.image_size, model)
    data, images = open_held_out(args, info, origin)
    path = output_file(origin, args, "embedding.png")
    features, labels, indices, corrupt = extract_features(model, images, size, args, args.device,
                                                         loaders.build_view(info))
    points, method = embedding.embed_2d(features, args.seed)
    labels, names, colors, note = embedding.group_images(data, labels, features, args.seed)
    title, thumbnails = f"{method} of {len(points):,} images", path.with_suffix(".thumbnails.png")
    title += f", features of {sheet.describe_model(origin, info, model.patch_size)}{note}"
    embedding.plot_scatter(points, labels, names, colors, title).savefig(path)
    embedding.plot_thumbnails(points, labels, names, colors, lambda i: show_channels(
        images[indices[i]][0], args.show_channels), title).save(thumbnails)
    print(f"{method} of {len(points):,} images -> {path} and {thumbnails}")
    errors += corrupt


def animate_embedding(args, errors):
    """t-SNE of image features over the saved epochs of a run, as one animation."""
    epochs, features, data, images = list_epochs(args.run), [], None, None
    path = Path(args.output or Path(args.output_dir or args.run, f"{args.checkpoint_key or 'teacher'}.embedding.gif"))
    if path.suffix.lower() not in (".gif", *WRITABLE):
        raise DataError(f"--output {path}: expected a file that ends with .gif, {', '.join(WRITABLE)}")
    if path.suffix.lower() in WRITABLE:
        import av  # noqa: F401  if it is missing, that is found before the work
    create_folder(path.parent)
    for checkpoint in epochs.values():
        args.ckpt = checkpoint
        model, info, origin = open_backbone(args, rgb_only=False)
        size = resolve_image_size(args.image_size, model)
        data, images = (data, images) if data else open_held_out(args, info, origin)
        x, labels, _, corrupt = extract_features(model, images, size, args, args.device, loaders.build_view(info))
        features.append(x)
    layouts, method = embedding.embed_sequence(features, args.seed)
    labels, names, colors, note = embedding.group_images(data, labels, features[-1], args.seed)
    title = f"{method} of {len(labels):,} images, {Path(args.run).resolve().name}{note}"
    captions = [f"epoch {epoch}" for epoch in epochs]
    write_animation(path, embedding.draw_frames(layouts, captions, labels, names, colors, title))
    print(f"{method} of {len(labels):,} images, {', '.join(captions)} -> {path}")
    errors += corrupt


def list_epochs(folder):
    """{epoch: path} of the numbered checkpoints in the folder of a run, and of its last one.

    Epochs count from 0, as in the log; the last may be incomplete.

    Raises:
        CheckpointError: no such folder, there are fewer than two, or the last one is not that of train.py.
    """
    if not os.path.isdir(folder):
        raise CheckpointError(f"--run {folder}: no such folder; name that of a run, such as runs/demo")
    found = {int(path.stem[10:]): str(path) for path in Path(folder).glob("checkpoint*.pth")
             if path.stem[10:].isdecimal()}
    last = os.path.join(folder, "checkpoint.pth")
    if os.path.exists(last):
        try:
            state = load_checkpoint(last)
            steps_per_epoch = state["fixed"]["num_images"] // state["fixed"]["global_batch_size"]
            found.setdefault((state["progress"]["step"] - 1) // steps_per_epoch, last)
        except (KeyError, TypeError):
            raise CheckpointError(f"{last}: is not of train.py") from None
    if len(found) < 2:
        raise CheckpointError(f"{folder}: saved epochs: {len(found)}, an animation needs two: train with "
                              f"--saveckp_freq 1")
    return dict(sorted(found.items()))


def open_held_out(args, info, origin):
    """The data for a model, and a random subset of its held-out images."""
    data = open_data_of_model(args, info, origin["ckpt"], default="shapes", output_dir=args.output_dir)
    print(data.note)
    return data, loaders.random_subset(data.val if data.train_labeled is data.train else data.train, args.num_images)


def write_animation(path, frames, rate=20, hold=16):
    """Write frames of `draw_frames` as GIF or video; each layout is held for `hold` frames."""
    if path.suffix.lower() == ".gif":
        palette, images, durations = None, [], []
        for image, is_layout in frames:
            palette = palette or image.quantize(method=Image.Quantize.FASTOCTREE)
            images.append(image.quantize(palette=palette, dither=Image.Dither.NONE))
            durations.append(1000 // rate * (hold if is_layout else 1))
        images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)
        return
    with VideoWriter(path, rate) as writer:
        for image, is_layout in frames:
            for _ in range(hold if is_layout else 1):
                writer.write("", image)


# ---- training ----

def visualize_run(args, errors):
    """Training curves and final metrics of one or several runs."""
    logs = [Path(name) if name.endswith(".jsonl") else Path(name, "log.jsonl") for name in args.runs]
    runs = {str(log.parent if log.name == "log.jsonl" else log.with_suffix("")): curves.read_log(log) for log in logs}
    output = Path(args.output or logs[0].with_name("curves.png"))
    if output.suffix.lower() not in (".png", ".jpg", ".pdf", ".svg"):
        raise DataError(f"--output {output}: expected a file that ends with .png, .jpg, .pdf or .svg")
    print(curves.format_table(runs))
    if args.knn:
        print(curves.format_time_to_accuracy(runs, args.knn))
    curves.plot_curves(runs, args.against).savefig(output)
    print(f"-> {output}")


def visualize_crops(args, errors):
    """Crops that multi-crop augmentation makes of an image, and their boxes in it."""
    parser = cli.build_parser("visualize.py", "")
    cli.add_crop_flags(parser)
    parser.add_argument("--channels", type=cli.positive_int)
    parser.add_argument("--value_range", type=cli.finite_float, nargs=2)
    flags, _ = parser.parse_known_args([*([f"@{args.flags}"] if args.flags else []), "--views", "cpu"])
    cli.check_crop_flags(parser, flags)
    statistics = dict(mean=[0.5] * flags.channels, std=[0.5] * flags.channels) if flags.channels else {}
    multicrop = loaders.build_multicrop(flags, channels=flags.channels, **statistics)
    create_folder(args.output_dir)
    options = dict(value_range=flags.value_range, channels=flags.channels)
    for name, image, _ in iter_readable_images(args, errors, args.output_dir, **options):
        path = Path(args.output_dir, f"{name}.crops.png")
        show = functools.partial(show_channels, shown=args.show_channels)
        sheet.draw_crops(name, multicrop, image, (args.seed, name), args.width, show).save(path)
        print(f"{2 + flags.local_crops_number} crops -> {path}")


TASKS = {"attention": visualize_attention, "video": visualize_video, "features": visualize_features,
         "embedding": visualize_embedding, "run": visualize_run, "crops": visualize_crops}


def main(args):
    if args.task in ("embedding", "run"):
        import matplotlib  # noqa: F401  if it is missing, that is found before the work
    errors = []  # messages on images and frames that were skipped
    TASKS[args.task](args, errors)
    for error in errors:
        print(f"skipped {error}")
    if errors:
        raise DataError(f"{len(errors)} skipped, the first: {errors[0]}")


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, CheckpointError)
