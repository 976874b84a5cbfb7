"""Segmentation without training: attention masks, and video object segmentation by label propagation.

    python segment.py masks                                     # newest run, on the built-in shapes
    python segment.py masks --ckpt dino_deitsmall16_pretrain.pth --data_path /data/VOC2012
    python segment.py video --ckpt dino_deitsmall16_pretrain.pth --data_path /data/DAVIS

`masks` thresholds the CLS attention of the last block and prints its Jaccard index with the objects of each image, for
the model and for random weights; NAME.masks.DATA.json beside the model file has the results, NAME.masks.DATA.png twelve
of the images with the mask of their best head. `video` propagates the masks of the first frame through each video,
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
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from common import cli
from common.files import create_folder, read_json, write_json
from common.precision import autocast
from common.weights import CheckpointError, build_untrained, open_backbone, output_folder, result_file
from data.datasets import DataError, data_name
from data.images import ImageReadError, read_image
from data.loaders import default_attention_size, normalize, resize_to_patches
from data.segmentation import build_loader, find_masks, find_sequences, mask_path, read_mask, read_names, save_mask
from evaluation.label_propagation import labels_to_mask, mask_to_labels, propagate_labels
from evaluation.masks import boundary_f, jaccard, summarize_over_time, threshold_attention
from plotting import sheet
from plotting.draw import COLORS, overlay_mask


def parse_args(argv=None):
    parser = cli.build_parser("segment.py", __doc__)
    masks, video = cli.add_subcommands(parser, TASKS).values()
    for task in (masks, video):
        cli.add_model_flags(task)
    masks.add_argument("--data_path", default="shapes", help="shapes[:PIXELS], or the folder of VOC2012 or DAVIS")
    masks.add_argument("--image_size", type=cli.image_side, help="shorter side (default: 480/224 of that as trained)")
    masks.add_argument("--mass", type=cli.fraction, default=0.6, help="share of the attention that a mask keeps")
    masks.add_argument("--num_images", type=cli.positive_int, help="evaluate N images, evenly spread (default: all)")
    video.add_argument("--data_path", required=True, metavar="DIR", help="folder with the layout of DAVIS")
    video.add_argument("--sequences", nargs="+", metavar="NAME", help="default: of ImageSets/2017/val.txt, else all")
    video.add_argument("--image_size", type=cli.image_side, default=480, help="shorter side of a frame")
    video.add_argument("--n_last_frames", type=cli.nonnegative_int, default=7, help="context frames besides the first")
    video.add_argument("--size_mask_neighborhood", type=cli.nonnegative_int, default=12, help="patches; 0 for no limit")
    video.add_argument("--topk", type=cli.positive_int, default=5, help="similar patches to average labels over")
    video.add_argument("--temperature", type=cli.positive_float, default=0.1, help="softmax temperature of the cosines")
    video.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast of the backbone")
    return parser.parse_args(argv)


# ---- attention masks ----

def evaluate_masks(args):
    """Jaccard index of thresholded CLS attention and objects: best head per object, mean of heads, random weights."""
    images, read = find_masks(args.data_path, args.num_images)
    model, info, origin = open_backbone(args, needs="attention")
    p = model.patch_size
    args.image_size = args.image_size or default_attention_size(model.grid[0] * p, p)
    origin |= dict(data_path=os.path.abspath(args.data_path) if os.path.exists(args.data_path) else args.data_path,
                   image_size=args.image_size, mass=args.mass, dataset_size=len(images))
    path = result_file(origin, args, f"masks.{data_name(args.data_path)}")
    models = {} if args.untrained else {"trained": model}
    models["untrained"] = build_untrained(info).to(args.device)
    scores, skipped, cells, across = [], [], [], sheet.choose_columns(min(12, len(images)), 1000)
    for example in tqdm(build_loader(images, read, args.num_workers), unit="img", leave=False, disable=None):
        if isinstance(example, str):
            skipped.append(example)
            continue
        image, objects, void = example
        x = normalize(resize_to_patches(image, args.image_size, p), info["mean"], info["std"])[None].to(args.device)
        results, masks = zip(*(evaluate_image(m, x, objects, void, args.mass) for m in models.values()))
        scores.append(torch.stack(results))
        if len(scores) > len(cells) * len(images) // 12:  # twelve, evenly spread
            head = results[0][2:].argmax()
            drawn = draw_masks(image, masks[0][1 + head], objects, sheet.cell_side(1000, across))
            cells.append((drawn, f"head {head + 1}, Jaccard index {results[0][2 + head]:.1%}"))
    if not scores:
        raise DataError(f"{args.data_path}: none of its images can be used; the last: {skipped[-1]}")
    print(f"Jaccard index (%), {args.mass:.0%} of the attention, {len(scores)} images, shorter side {args.image_size}")
    result = {}
    for name, (best, mean, *heads) in zip(models, torch.stack(scores).mean(dim=0).mul(100).tolist()):
        print(f"{name:9}  best head {best:.1f}  mean of heads {mean:.1f}  heads", *(f"{head:.1f}" for head in heads))
        result[name] = dict(best_head=best, mean_of_heads=mean, heads=heads)
    write_json(path, vars(args) | origin | dict(num_images=len(scores), skipped=skipped, jaccard=result))
    title = f"Attention masks of {sheet.describe_model(origin, info, p)}"
    legend = [sheet.draw_swatch(COLORS[0], f"patches with {args.mass:.0%} of the attention of the best head", 1000),
              "White: outline of the objects."]
    sheet.contact_sheet([(cells, across)], 1000, title, legend).save(path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png').name}")
    if skipped:
        raise DataError(f"skipped {len(skipped)} of {len(images)} images; the first: {skipped[0]}")


@torch.no_grad()
def evaluate_image(model, x, objects, void, mass):
    """Jaccard index of an image's attention masks and its objects.

    Args:
        x: image [1, 3, h*p, w*p].
        objects, void: bool [O, H, W] and [H, W], of the image at any size.

    Returns:
        float64 [2 + heads], means over objects: the best head for each object, the mean of heads, and each head; and
        masks of the mean and of each head, bool [1 + heads, H, W].
    """
    attention = model.forward_with_attention(x)[1][0].cpu()  # [heads, N]
    attention = torch.cat((attention.mean(dim=0, keepdim=True), attention))
    masks = threshold_attention(attention, mass).view(1, len(attention), x.shape[-2] // model.patch_size, -1)
    masks = F.interpolate(masks.float(), size=objects.shape[-2:], mode="nearest-exact")[0] > 0
    scores = torch.stack([jaccard(mask, objects, void) for mask in masks])  # [1 + heads, O]
    return torch.cat((scores[1:].amax(dim=0, keepdim=True), scores)).mean(dim=1), masks


def draw_masks(image, mask, objects, width):
    """Image [3, H, W] with an attention mask, bool [H, W], in color, and the outline of objects [O, H, W] in white."""
    image = overlay_mask(sheet.resize_to_width(to_pil_image(image), width), mask, COLORS[0])
    return overlay_mask(image, objects.any(dim=0), (255, 255, 255), opacity=0)


# ---- video object segmentation ----

def segment_videos(args):
    """Video object segmentation: propagate the masks of the first frame, and evaluate J and F."""
    val_list = Path(args.data_path, "ImageSets", "2017", "val.txt")
    names = args.sequences or (read_names(val_list) if val_list.is_file() else None)
    sequences = find_sequences(args.data_path, names)
    model, info, origin = open_backbone(args, needs="patch tokens", precision=args.precision)
    args.normalization = info["mean"], info["std"]
    output = output_folder(origin, args, f"video.{data_name(args.data_path)}")
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
    read = partial(read_frame, size=size, height=rows * p, width=cols * p, normalization=args.normalization)
    features = (extract_patch_features(model, frame, args) for frame in build_loader(frames, read, args.num_workers))
    folder.mkdir(exist_ok=True)
    save_mask(folder / f"{frames[0].stem}.png", mask, palette)
    save_overlay(folder, frames[0], mask, classes[1:])
    masks = {}
    bar = tqdm(frames[1:], desc=folder.name, unit="frame", leave=False, disable=None)
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


def read_frame(path, size, height, width, normalization):
    """Frame of `size` pixels -> [1, 3, height, width], normalized.

    Resized as in the released evaluation: bilinear without antialiasing, then rounded. Its standard deviation of the
    red channel, 0.228 instead of 0.229, is not reproduced.
    """
    image = read_image(path)
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
    frames = [frame for frame in masks if mask_path(frame).is_file()][:-1]
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


TASKS = {"masks": evaluate_masks, "video": segment_videos}


def main(args):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise DataError("runs in one process: start it with python, not torchrun")
    TASKS[args.task](args)


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, CheckpointError)
