"""Segmentation without training: attention masks, object discovery, and label propagation through videos.

    python segment.py masks                                     # newest run, on the built-in shapes
    python segment.py masks --ckpt dino_deitsmall16_pretrain.pth --data_path /data/VOC2012
    python segment.py masks --data_path /photos --write masks   # masks as PNGs, and boxes, of any images
    python segment.py discover                                  # one object of each image, by TokenCut or LOST
    python segment.py discover --method lost --data_path /data/VOCdevkit/VOC2007
    python segment.py video --ckpt dino_deitsmall16_pretrain.pth --data_path /data/DAVIS

`masks` thresholds the CLS attention of the last block and prints its Jaccard index with the objects of each image, for
the model and for random weights; NAME.masks.DATA.json beside the model file has the results, NAME.masks.DATA.png twelve
of the images with the mask of their best head. `discover` finds one object of each image from the keys of the last
block, and prints CorLoc, the share of images with an object that its box overlaps by half; NAME.METHOD.DATA.json and
.png are like those of `masks`, and it runs under torchrun too. `--write DIR` of both writes a mask of each image, and
boxes.json, the boxes in the format of COCO. `video` propagates the masks of the first frame through each video,
writes them as DAVIS expects, NAME.video.DATA/SEQUENCE/FRAME.png, with overlays on the frames in SEQUENCE.overlay/, and
evaluates J and F. Interrupted runs resume with the next sequence. Caron et al. 2021, section 4.2.2.
"""

import common  # noqa: F401 (first: it checks the version of Python)

# isort: split
import itertools
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.ops import box_iou
from torchvision.transforms.functional import to_pil_image

from common import cli, distributed
from common.checkpoint import CheckpointError
from common.files import create_folder, read_json, write_json
from common.logger import progress_bar
from common.paths import output_folder, result_file
from common.precision import autocast
from common.weights import build_untrained, open_backbone
from data.datasets import DataError, data_name
from data.images import ImageReadError, read_image
from data.loaders import compute_patch_grid, default_attention_size, normalize, resize_to_patches
from data.segmentation import (
    build_loader,
    find_boxes,
    find_masks,
    find_sequences,
    mask_path,
    read_mask,
    read_names,
    save_mask,
)
from evaluation import discovery
from evaluation.label_propagation import labels_to_mask, mask_to_labels, propagate_labels
from evaluation.masks import boundary_f, jaccard, mask_mean_and_heads, summarize_over_time
from plotting import sheet
from plotting.draw import COLORS, overlay_mask

INFO = dict(description="masks and boxes of segment.py")  # in boxes.json: a folder that this command has written


def parse_args(argv=None):
    parser = cli.build_parser("segment.py", __doc__)
    masks, discover, video = cli.add_subcommands(parser, TASKS).values()
    for task in (masks, discover, video):
        cli.add_model_flags(task)
    for task in (masks, discover):
        task.add_argument("--data_path", default="shapes",
                          help="shapes[:PIXELS], VOC, ADE20K, DAVIS, a folder with images/ and masks/, or any images")
        task.add_argument("--image_size", type=cli.image_side if task is masks else cli.nonnegative_int,
                          help="shorter side (default: 480/224 of that as trained)" + "; 0: as it is, as published" * (
                              task is discover))
        task.add_argument("--num_images", type=cli.positive_int, help="evaluate N images, evenly spread (default: all)")
        task.add_argument("--write", metavar="DIR", help="folder for the mask of each image, and boxes.json")
    masks.add_argument("--mass", type=cli.fraction, default=0.6, help="share of the attention that a mask keeps")
    discover.add_argument("--method", choices=discovery.METHODS, default="tokencut", help="published method")
    video.add_argument("--data_path", required=True, metavar="DIR", help="folder with the layout of DAVIS")
    video.add_argument("--sequences", nargs="+", metavar="NAME", help="default: of ImageSets/2017/val.txt, else all")
    video.add_argument("--image_size", type=cli.image_side, default=480, help="shorter side of a frame")
    video.add_argument("--n_last_frames", type=cli.nonnegative_int, default=7, help="context frames besides the first")
    video.add_argument("--size_mask_neighborhood", type=cli.nonnegative_int, default=12, help="patches; 0 for no limit")
    video.add_argument("--topk", type=cli.positive_int, default=5, help="similar patches to average labels over")
    video.add_argument("--temperature", type=cli.positive_float, default=0.1, help="softmax temperature of the cosines")
    video.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast of the backbone")
    args = parser.parse_args(argv)
    if args.task != "video" and args.write and Path(os.path.realpath(args.write)).is_relative_to(
            os.path.realpath(args.data_path)):
        parser.error(f"--write {args.write}: masks would be written among the images, name a folder outside of "
                     f"--data_path")
    return args


# ---- attention masks ----

@torch.no_grad()
def evaluate_masks(args):
    """Jaccard index of thresholded CLS attention and objects: best head per object, mean of heads, random weights."""
    images, read, model, info, origin, path, names, across = open_evaluation(
        args, partial(find_masks, args.data_path, args.num_images, bool(args.write)), args.device, "attention", "masks",
        mass=args.mass)
    models = dict(untrained=model) if args.untrained else dict(
        trained=model, untrained=build_untrained(info).to(args.device))
    scores, skipped, cells, records = [], [], [], []
    for i, example in enumerate(progress_bar(build_loader(images, read, args.num_workers), unit="img")):
        if isinstance(example, str):
            skipped.append(example)
            continue
        image, objects, void = example
        if not (len(objects) or args.write):
            continue
        x = normalize(resize_to_patches(image, args.image_size, model.patch_size), info["mean"], info["std"])
        compute = partial(compute_attention_masks, x=x[None].to(args.device), size=image.shape[1:], mass=args.mass)
        masks = compute(model)
        if args.write:
            records.append(write_object_mask(args.write, names[i], masks[0]))
        if not len(objects):
            continue
        scores.append(torch.stack([score_masks(masks if m is model else compute(m), objects, void)
                                   for m in models.values()]))
        if len(scores) > len(cells) * len(images) // 12:  # twelve, evenly spread
            head = scores[-1][0, 2:].argmax()
            drawn = draw_masks(image, masks[1 + head], objects, sheet.cell_side(1000, across))
            cells.append((drawn, f"head {head + 1}, Jaccard index {scores[-1][0, 2 + head]:.1%}"))
    if records:
        write_boxes(args.write, records)
    if scores:
        print(f"Jaccard index (%), {args.mass:.0%} of the attention, {len(scores)} images, shorter side "
              f"{args.image_size}")
        result = {}
        for name, (best, mean, *heads) in zip(models, torch.stack(scores).mean(dim=0).mul(100).tolist()):
            print(f"{name:9}  best head {best:.1f}  mean of heads {mean:.1f}  heads",
                  *(f"{head:.1f}" for head in heads))
            result[name] = dict(best_head=best, mean_of_heads=mean, heads=heads)
        write_json(path, vars(args) | origin | dict(num_images=len(scores), skipped=skipped, jaccard=result))
        write_sheet(path, cells, across, f"Attention masks of {sheet.describe_model(origin, info, model.patch_size)}",
                    f"patches with {args.mass:.0%} of the attention of the best head", "outline of the objects")
    check_skipped(args, images, skipped, scores or records)


def score_masks(masks, objects, void):
    """Jaccard index of attention masks, bool [1 + heads, H, W], of the mean and each head, and objects of the image.

    Args:
        objects, void: bool [O, H, W] and [H, W].

    Returns:
        float64 [2 + heads], means over objects: the best head for each object, the mean of heads, and each head.
    """
    scores = torch.stack([jaccard(mask, objects, void) for mask in masks])  # [1 + heads, O]
    return torch.cat((scores[1:].amax(dim=0, keepdim=True), scores)).mean(dim=1)


def compute_attention_masks(model, x, size, mass):
    """Thresholded attention of the mean of the heads and of each head: [1, 3, h*p, w*p] -> bool [1 + heads, *size]."""
    attention = model.forward_with_attention(x)[1][0].cpu()  # [heads, N]
    maps = attention.unflatten(1, (x.shape[-2] // model.patch_size, -1))
    return resize_masks(mask_mean_and_heads(maps, mass), size)


def resize_masks(masks, size):
    """Masks of patches, bool [M, h, w] -> nearest of each pixel, bool [M, *size]."""
    return F.interpolate(masks[None].float(), size=tuple(size), mode="nearest-exact")[0] > 0


def draw_masks(image, mask, objects, width):
    """Image [3, H, W] with an attention mask, bool [H, W], in color, and the outline of objects [O, H, W] in white."""
    image = overlay_mask(sheet.resize_to_width(to_pil_image(image), width), mask, COLORS[0])
    return overlay_mask(image, objects.any(dim=0), (255, 255, 255), opacity=0)


# ---- object discovery ----

def discover_objects(args):
    """Unsupervised discovery of one object per image: LOST or TokenCut; CorLoc with the boxes of VOC or of masks."""
    _, world_size, device = distributed.init_distributed(args.device)
    images, read, model, info, origin, path, names, across = open_evaluation(
        args, partial(find_truth, args.data_path, args.num_images), device, "keys", args.method, method=args.method)
    drawn, results = {i * len(images) // 12 for i in range(12)}, []  # twelve, evenly spread
    mine = range(distributed.get_rank(), len(images), world_size)

    def discover():
        loader = build_loader([images[i] for i in mine], read, args.num_workers)
        for i, example in zip(mine, progress_bar(loader, unit="img")):
            results.append((i, example) if isinstance(example, str) else (i, discover_object(
                model, *example, info, args, names[i], sheet.cell_side(1000, across) if i in drawn else None)))
    distributed.wait_for(discover)
    results = sorted(sum(distributed.all_gather_objects(results), []), key=lambda item: item[0])
    if distributed.is_rank_zero():
        skipped = [result for _, result in results if isinstance(result, str)]
        records = [result for _, result in results if not isinstance(result, str)]
        if records and args.write:
            write_boxes(args.write, records)
        if records:
            title = f"Objects found by {args.method} with {sheet.describe_model(origin, info, model.patch_size)}"
            report_discovery(records, skipped, path, args, origin, across, title)
        check_skipped(args, images, skipped, records)


def find_truth(data_path, num_images, value_range):
    """Images of VOC with its boxes, or others with those of their masks: see `find_boxes` and `find_masks`."""
    if found := find_boxes(data_path, num_images, value_range):
        return found
    images, read = find_masks(data_path, num_images, True, value_range)
    return images, partial(read_mask_boxes, read)


def read_mask_boxes(read, entry):
    """Image [3, H, W] and the boxes [M, 4] of the connected parts of its objects; see `find_masks`."""
    image, objects, _ = read(entry)
    return image, torch.cat([torch.empty(0, 4), *map(discovery.find_component_boxes, objects)])


def discover_object(model, image, truth, info, args, name, width):
    """Find the object of an image [3, H, W], compare its box with those of the truth [M, 4], and write its mask.

    Args:
        width: of a drawing, None for none.

    Returns:
        {"file", "box", "iou": with the best of the truth, None without any, "drawing", ...}; a message if the image has
        too many patches.
    """
    size, p = image.shape[1:], model.patch_size
    rows, cols = compute_patch_grid(size, args.image_size, p) if args.image_size else (-(-side // p) for side in size)
    if (count := rows * cols) > discovery.MAX_PATCHES:
        return f"{name}: {count:,} patches are more than {discovery.MAX_PATCHES:,}, set a smaller --image_size"
    x = normalize(resize_to_patches(image, args.image_size, p) if args.image_size else image, info["mean"], info["std"])
    x = F.pad(x, (0, -x.shape[2] % p, 0, -x.shape[1] % p))  # as published; resized images are whole patches
    mask = discovery.METHODS[args.method](discovery.extract_keys(model, x[None].to(next(model.parameters()).device)))
    padded = size if args.image_size else x.shape[1:]
    box = boxes_of_pixels(discovery.find_component_boxes(mask), mask.shape, padded)
    box = box.minimum(torch.tensor([*size, *size]).flip(0))
    mask = resize_masks(mask[None], padded)[0][:size[0], :size[1]]
    iou = box_iou(box.float(), truth.float()).max().item() if len(truth) else None
    drawing = width and draw_boxes(image, mask, box, truth, width)
    record = write_object_mask(args.write, name, mask) if args.write else {}
    return record | dict(file=name, box=box[0].tolist(), iou=iou, drawing=drawing)


def boxes_of_pixels(boxes, grid, size):
    """Boxes [n, 4] in patches of a grid (rows, columns) -> in pixels of (height, width), at least one of each side.

    Those of `resize_masks`, but where patches are smaller than pixels, of which a mask then has too few.
    """
    scale = torch.tensor([size[1] / grid[1], size[0] / grid[0]]).repeat(2)
    first, end = (boxes * scale - 0.5).ceil().long().split(2, dim=1)
    first = first.minimum(torch.tensor([size[1] - 1, size[0] - 1]))
    return torch.cat((first, end.maximum(first + 1)), dim=1)


def report_discovery(records, skipped, path, args, origin, across, title):
    """Print CorLoc; write the results of `discover_object` as JSON, and a contact sheet."""
    ious = [record["iou"] for record in records if record["iou"] is not None]
    corloc = 100 * np.mean(np.array(ious) >= 0.5).item() if ious else None
    print(f"{args.method}: {len(records)} images, " + (
        f"CorLoc {corloc:.1f} on {len(ious)} with objects" if ious else "no boxes or masks to compare with"))
    kept = [{name: record[name] for name in ("file", "box", "iou")} for record in records]
    write_json(path, vars(args) | origin | dict(corloc=corloc, num_images=len(ious), skipped=skipped, objects=kept))
    cells = [(record["drawing"], record["file"] + ("" if record["iou"] is None else f", IoU {record['iou']:.2f}"))
             for record in records if record["drawing"]]
    write_sheet(path, cells, across, title, "object and its box", "true boxes")


def draw_boxes(image, mask, boxes, truth, width):
    """Image [3, H, W] with a mask, bool [H, W], and boxes [n, 4] in color, and true boxes [M, 4] in white."""
    drawn = overlay_mask(sheet.resize_to_width(to_pil_image(image), width), mask, COLORS[0])
    scale = torch.tensor([drawn.width / image.shape[2], drawn.height / image.shape[1]]).repeat(2)
    for some, color in ((truth, (255, 255, 255)), (boxes, COLORS[0])):
        for left, top, right, bottom in (some * scale).round().tolist():
            ImageDraw.Draw(drawn).rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=color,
                                            width=2)
    return drawn


# ---- what masks and discover share ----

def open_evaluation(args, find, device, needs, name, **settings):
    """Model, images and output of an evaluation of images with masks or boxes.

    Args:
        find: value_range of the model -> list of entries of images, and a function that reads one.

    Returns:
        these two; model, description and origin, see `open_backbone`; Path of the result; name of each image; columns
        of its contact sheet.
    """
    model, info, origin = open_backbone(args, device, needs=needs)
    images, read = find(value_range=origin["value_range"])
    p = model.patch_size
    if args.image_size is None:
        args.image_size = default_attention_size(model.grid[0] * p, p)
    if 0 < args.image_size < 2 * p:
        raise DataError(f"--image_size {args.image_size} is less than two patches of {p} pixels")
    origin |= dict(data_path=os.path.abspath(args.data_path) if os.path.exists(args.data_path) else args.data_path,
                   image_size=args.image_size, **settings, dataset_size=len(images))
    path = result_file(origin, args, f"{name}.{data_name(args.data_path)}")
    if os.path.realpath(path.parent) == os.path.realpath(args.data_path):
        raise DataError(f"{path.parent}: outputs would be written among the images, choose another --output_dir")
    names = distributed.run_on_rank_zero_first(lambda: prepare_writing(args, images))  # others find its boxes.json
    return images, read, model, info, origin, path, names, sheet.choose_columns(min(12, len(images)), 1000)


def check_skipped(args, images, skipped, results):
    if not results:
        raise DataError(f"{args.data_path}: none of its images can be used" + (
            f"; the last: {skipped[-1]}" if skipped else ", their masks are empty"))
    if skipped:
        raise DataError(f"skipped {len(skipped)} of {len(images)} images; the first: {skipped[0]}")


def write_sheet(path, cells, across, title, colored, white):
    """Write (image, caption) pairs, if any, as a contact sheet beside a result, with the meaning of its colors."""
    if cells:
        legend = [sheet.draw_swatch(COLORS[0], colored, 1000), f"White: {white}."]
        sheet.contact_sheet([(cells, across)], 1000, title, legend).save(path.with_suffix(".png"))
    print(f"wrote {path}" + f" and {path.with_suffix('.png').name}" * bool(cells))


def prepare_writing(args, images):
    """Create the folder of --write; returns the name of each image: its path relative to --data_path, or its index."""
    names = [f"{entry:05}.png" if isinstance(entry, int) else
             Path(os.path.relpath(entry[0], args.data_path)).as_posix() for entry in images]
    if args.write:
        taken = {}
        for name in names:
            if (other := taken.setdefault(Path(name).with_suffix(""), name)) != name:
                raise DataError(f"{args.data_path}: the masks of {other} and {name} would be one file, rename one")
        paths = {name: Path(args.write, name).with_suffix(".png") for name in names}
        boxes = Path(args.write, "boxes.json")
        written = read_json(boxes)
        if written.get("info") != INFO:
            paths, written = {"": boxes} | paths, dict(info=INFO, images=[], annotations=[], categories=[])
        own = {image["file_name"] for image in written["images"]} | {*written.get("masks", ())}
        if foreign := next((path for name, path in paths.items() if name not in own and path.exists()), None):
            raise DataError(f"--write {args.write}: {foreign} was not written by this command, name another folder")
        create_folder(args.write)
        write_json(boxes, written | dict(masks=sorted(own.union(names))))  # own from now on, also if interrupted
    return names


def write_object_mask(folder, name, mask):
    """Write a mask, bool [H, W], with the path of its image and the ending .png; returns a record for `write_boxes`.

    Index 1 is the object.
    """
    path = Path(folder, name).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_mask(path, mask.numpy(), [0, 0, 0, *COLORS[0]])
    areas = torch.bincount(discovery.label_components(mask).flatten())[1:].tolist()
    return dict(file=name, size=list(mask.shape), boxes=discovery.find_component_boxes(mask).tolist(), areas=areas)


def write_boxes(folder, records):
    """Write boxes.json in the format of COCO: a box for each connected part of each mask, and its area in pixels."""
    images, annotations = [], []
    for i, record in enumerate(records, start=1):
        height, width = record["size"]
        images.append(dict(id=i, file_name=record["file"], height=height, width=width))
        for (left, top, right, bottom), area in zip(record["boxes"], record["areas"]):
            annotations.append(dict(id=len(annotations) + 1, image_id=i, category_id=1, area=area, iscrowd=0,
                                    bbox=[left, top, right - left, bottom - top]))
    categories, path = [dict(id=1, name="object")], Path(folder, "boxes.json")
    write_json(path, read_json(path) | dict(images=images, annotations=annotations, categories=categories))
    print(f"wrote {len(images)} masks and {len(annotations)} boxes to {folder}")


# ---- video object segmentation ----

def segment_videos(args):
    """Video object segmentation: propagate the masks of the first frame, and evaluate J and F."""
    val_list = Path(args.data_path, "ImageSets", "2017", "val.txt")
    names = args.sequences or (read_names(val_list) if val_list.is_file() else None)
    sequences = find_sequences(args.data_path, names)
    model, info, origin = open_backbone(args, needs="patch tokens", precision=args.precision)
    args.normalization, args.value_range = (info["mean"], info["std"]), origin["value_range"]
    output = output_folder(origin, args, f"video.{data_name(args.data_path)}")
    for part in ("JPEGImages", "Annotations"):
        if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(Path(args.data_path, part))):
            raise DataError(f"{output}: masks would be written among those of the data, choose another --output_dir")
    create_folder(output)
    flags = ("image_size", "n_last_frames", "size_mask_neighborhood", "topk", "temperature", "precision")
    origin |= dict(data_path=os.path.abspath(args.data_path)) | {name: getattr(args, name) for name in flags}
    path, failed = output / "result.json", []
    previous = read_json(path)
    is_same_run = all(previous.get(name) == origin[name] for name in origin.keys() - {"ckpt"})
    scores = previous.get("sequences", {}) if is_same_run else {}
    write_json(path, origin | {"sequences": scores})  # masks of other flags are about to be overwritten
    for name, frames in sequences.items():
        try:
            if name not in scores:
                scores[name] = segment_sequence(model, frames, output / name, args)
                write_json(path, origin | {"sequences": scores})
            print(f"{name}: {format_scores(scores[name].values())}")
        except ImageReadError as error:
            failed.append(str(error))
            print(f"{name}: skipped, {error}")
    objects = [score for name in sequences for score in scores.get(name, {}).values()]
    print(f"sequences {len(sequences) - len(failed)}, objects {len(objects)}: {format_scores(objects)}\n"
          f"wrote {output}")
    if failed:
        raise DataError(f"skipped {len(failed)} of {len(sequences)} sequences; the first: {failed[0]}")


def segment_sequence(model, frames, folder, args):
    """Write a mask for each frame of a sequence into a folder; returns the scores of `evaluate_objects`.

    Raises:
        ImageReadError: a frame or mask cannot be used; the masks of the frames before it are written.
    """
    size, p = read_image(frames[0]).size, model.patch_size
    mask, palette, _ = read_mask(mask_path(frames[0]), size)
    classes = np.unique(np.append(mask, 0))  # object indices; class 0 is the background
    if len(classes) == 1:
        raise ImageReadError(f"{mask_path(frames[0])}: has no object")
    rows, cols = compute_grid(*size, args.image_size, p)
    first = mask_to_labels(torch.from_numpy(np.searchsorted(classes, mask)), len(classes), rows, cols).to(args.device)
    read = partial(read_frame, size=size, height=rows * p, width=cols * p, normalization=args.normalization,
                   value_range=args.value_range)
    features = (extract_patch_features(model, frame, args) for frame in build_loader(frames, read, args.num_workers))
    folder.mkdir(exist_ok=True)
    save_mask(folder / f"{frames[0].stem}.png", mask, palette)
    save_overlay(folder, frames[0], mask, classes[1:])
    masks = {}
    bar = progress_bar(frames[1:], desc=folder.name, unit="frame")
    for frame, labels in zip(bar, propagate_labels(features, first, args.n_last_frames, args.topk,
                                                   args.size_mask_neighborhood, args.temperature)):
        mask = Image.fromarray(labels_to_mask(labels, rows * p, cols * p).byte().cpu().numpy())
        masks[frame] = classes[np.asarray(mask.resize(size, Image.Resampling.NEAREST))]
        save_mask(folder / f"{frame.stem}.png", masks[frame], palette)
        save_overlay(folder, frame, masks[frame], classes[1:])
    return evaluate_objects(masks, classes[1:].tolist(), size)


def save_overlay(folder, frame, mask, indices):
    """Write a frame with its objects in colors, object indices [H, W], to the folder beside that of its masks."""
    image, folder = read_image(frame), folder.with_name(f"{folder.name}.overlay")
    for index, color in zip(indices, itertools.cycle(COLORS)):
        image = overlay_mask(image, mask == index, color)
    folder.mkdir(exist_ok=True)
    image.save(folder / f"{frame.stem}.jpg", quality=90)


def compute_grid(width, height, shorter_side, p):
    """Rows and columns of patches for a frame; the longer side is cropped to a multiple of 64 pixels, as released."""
    longer_side = max(width, height) * shorter_side // min(width, height)
    step = 64 if 64 % p == 0 else p
    short, long = max(1, shorter_side // p), max(1, longer_side // step) * step // p
    return (short, long) if height <= width else (long, short)


def read_frame(path, size, height, width, normalization, value_range=None):
    """Frame of `size` pixels -> [1, 3, height, width], normalized.

    Resized as in the released evaluation: bilinear without antialiasing, then rounded. Its standard deviation of the
    red channel, 0.228 instead of 0.229, is not reproduced.
    """
    image = read_image(path, value_range=value_range)
    if image.size != size:
        raise ImageReadError(f"{path}: {image.width} x {image.height} pixels, the first frame {size[0]} x {size[1]}")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    return normalize(F.interpolate(pixels, size=(height, width), mode="bilinear").round() / 255, *normalization)


@torch.no_grad()
def extract_patch_features(model, image, args):
    """Image [1, 3, H, W] -> patch tokens of the last block [H/p, W/p, D]; raises ImageReadError for a message."""
    if isinstance(image, str):
        raise ImageReadError(image)
    with autocast(torch.device(args.device), args.precision):
        tokens = model.get_intermediate_layers(image.to(args.device))[0][0, 1:]
    return tokens.unflatten(0, (image.shape[-2] // model.patch_size, -1))


def evaluate_objects(masks, indices, size):
    """J and F of each object over time, as DAVIS defines them: {object: {"J": {"mean", "recall", "decay"}, "F": ...}}.

    The first and the last frame do not count, nor do frames without ground truth; unlabeled pixels are background.

    Args:
        masks: {frame path: predicted object indices [H, W]}, without the first frame.
        indices: objects of the first frame.
    """
    frames = [frame for frame in list(masks)[:-1] if mask_path(frame).is_file()]
    truths = {frame: read_mask(mask_path(frame), size)[0] for frame in frames}
    scores = {}
    for index in indices if frames else []:
        pairs = [[torch.from_numpy(mask == index) for mask in (masks[frame], truths[frame])] for frame in frames]
        scores[str(index)] = {name: summarize_over_time(torch.stack([metric(*pair) for pair in pairs]))
                              for name, metric in (("J", jaccard), ("F", boundary_f))}
    return scores


def format_scores(scores):
    """J&F, and the mean, recall and decay of J and F, percent, averaged over objects."""
    if not scores:
        return "no ground truth between the first and the last frame"
    means = {name: 100 * np.mean([list(score[name].values()) for score in scores], axis=0) for name in "JF"}
    return f"J&F {(means['J'][0] + means['F'][0]) / 2:.1f}, " + ", ".join(
        "{} {:.1f} (recall {:.1f}, decay {:.1f})".format(name, *values) for name, values in means.items())


TASKS = {"masks": evaluate_masks, "discover": discover_objects, "video": segment_videos}


def main(args):
    if args.task != "discover" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise DataError("runs in one process: start it with python, not torchrun")
    TASKS[args.task](args)


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, CheckpointError)
