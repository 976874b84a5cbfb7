"""What attention and patch features segment, without having learnt to: the paper's emergent properties.

    python segment.py masks                                     # attention of the newest run, on the built-in pictures
    python segment.py masks --ckpt dino_deitsmall16_pretrain.pth --data_path /data/VOC2012
    python segment.py video --ckpt dino_deitsmall16_pretrain.pth --data_path /data/DAVIS

`masks` overlaps the patches that get most of the last block's CLS attention with the objects of each picture, and
says the same of random weights; the figures go into NAME.masks.json beside the model file. `video` carries the masks
of a first frame through the video, writes them as DAVIS wants them, NAME.video/SEQUENCE/FRAME.png, and judges them by
its rules; the same command goes on where it was stopped.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common import cli
from common.checkpoint import write_json
from common.cli import fraction, nonnegative_int, positive_float, positive_int
from common.precision import autocast
from common.weights import CheckpointError, build_untrained, open_backbone, output_file, output_folder
from data.datasets import DataError
from data.images import ImageReadError, read_image
from data.loaders import default_attention_size, normalize, resize_to_patches
from data.segmentation import FallibleDataset, find_sequences, mask_path, open_masks, read_mask, read_names, save_mask
from evaluation.label_propagation import labels_to_mask, mask_to_labels, propagate_labels
from evaluation.masks import boundary_f, jaccard, summarize_over_time, threshold_attention


def parse_args(argv=None):
    parser = cli.build_parser("segment.py", __doc__)
    tasks = cli.add_subcommands(parser, TASKS)
    for task in tasks.values():
        cli.add_model_flags(task)
    add = tasks["masks"].add_argument
    add("--data_path", default="shapes", help="shapes[:PIXELS], a folder in the layout of VOC2012, or one in that of "
        "DAVIS, whose frames are taken as pictures (default: shapes)")
    add("--image_size", type=positive_int, metavar="PIXELS", help="shorter side of a picture (default: 480 for a model "
        "trained at 224, and in proportion)")
    add("--mass", type=fraction, default=0.6, metavar="X", help="share of the attention that a mask keeps (default: 0.6)")
    add("--pictures", type=positive_int, metavar="N", help="at most so many, evenly spread (default: all)")
    add("--output_dir", metavar="DIR", help="folder for NAME.masks.json (default: that of the model file)")

    add = tasks["video"].add_argument
    add("--data_path", required=True, metavar="DIR", help="a folder that holds JPEGImages/480p/SEQUENCE/FRAME.jpg and "
        "Annotations/480p/SEQUENCE/FRAME.png, of the first frame at least")
    add("--sequences", nargs="+", metavar="NAME", help="which (default: those of ImageSets/2017/val.txt, or all)")
    add("--image_size", type=positive_int, default=480, metavar="PIXELS", help="shorter side of a frame (default: 480)")
    add("--n_last_frames", type=nonnegative_int, default=7, metavar="N",
        help="frames that labels come from, besides the first (default: 7)")
    add("--size_mask_neighborhood", type=nonnegative_int, default=12, metavar="N",
        help="patches that an object may move in each direction, 0 for any (default: 12)")
    add("--topk", type=positive_int, default=5, metavar="K", help="patches that each takes its label from (default: 5)")
    add("--temperature", type=positive_float, default=0.1, metavar="T",
        help="of the softmax that weights them (default: 0.1)")
    add("--precision", default="fp32", choices=["fp32", "bf16", "fp16"], help="of the backbone (default: fp32)")
    add("--output_dir", metavar="DIR", help="folder for the masks (default: NAME.video beside the model file)")
    for task in tasks.values():
        cli.add_device_flags(task)
    return parser.parse_args(argv)


# ---- masks of attention ----

def attention_masks(args):
    """Jaccard of the thresholded CLS attention: the best head for each object, the heads' mean, random weights."""
    pictures = open_masks(args.data_path, args.pictures)
    model, info, origin = open_backbone(args, needs="attention")
    shorter = args.image_size or default_attention_size(model.grid[0] * model.patch_size, model.patch_size)
    path = output_file(origin, args, "masks.json")
    models = {"untrained": model} if args.untrained else {"trained": model, "untrained": build_untrained(info)}
    models = {name: network.to(args.device) for name, network in models.items()}
    scores, left_out = {name: [] for name in models}, []
    loader = torch.utils.data.DataLoader(pictures, batch_size=None, num_workers=args.num_workers)
    for item in tqdm(loader, unit="img", leave=False, disable=not sys.stderr.isatty()):
        if isinstance(item, str):
            left_out.append(item)
            continue
        image, objects, void = item
        x = normalize(resize_to_patches(image, shorter, model.patch_size))[None].to(args.device)
        for name, network in models.items():
            scores[name].append(overlap(network, x, objects.to(args.device), void.to(args.device), args.mass))
    count = len(pictures) - len(left_out)
    if not count:
        raise DataError(f"{args.data_path}: no picture with its mask can be used; the last: {left_out[-1]}")
    table = {name: torch.stack(values).mean(dim=0).mul(100).tolist() for name, values in scores.items()}
    print(f"Jaccard of {args.mass:.0%} of the attention and the objects of {count} pictures, shorter side {shorter} "
          f"pixels\n{'':12}best head  mean of heads   each head")
    for name, (best, mean, *heads) in table.items():
        print(f"{name:12}{best:9.1f}  {mean:13.1f}   {' '.join(f'{head:.1f}' for head in heads)}")
    write_json(path, origin | dict(
        data_path=args.data_path, image_size=shorter, mass=args.mass, pictures=count, left_out=left_out,
        jaccard={name: dict(best_head=row[0], mean_of_heads=row[1], heads=row[2:]) for name, row in table.items()}))
    print(f"written to {path}")
    if left_out:
        raise DataError(f"{len(left_out)} of {len(pictures)} pictures were left out; the first: {left_out[0]}")


@torch.no_grad()
def overlap(model, x, objects, void, mass):
    """Jaccard of a picture's attention and its objects: the best head for each, the mean of heads, and each head.

    Args:
        x: the picture, [1, 3, h*p, w*p].
        objects, void: bool [O, H, W] and [H, W], of the picture at any size.

    Returns:
        float64 [2 + heads], means over the objects.
    """
    attention = model.forward_with_attention(x)[1][0]  # [heads, N]
    attention = torch.cat((attention, attention.mean(dim=0, keepdim=True)))
    kept = threshold_attention(attention, mass).view(1, len(attention), x.shape[-2] // model.patch_size, -1)
    kept = F.interpolate(kept.float(), size=objects.shape[-2:], mode="nearest-exact")[0] > 0
    *heads, mean = (jaccard(mask, objects, void) for mask in kept)  # [O] each
    heads = torch.stack(heads)
    return torch.cat((torch.stack((heads.amax(dim=0), mean)), heads)).mean(dim=1).cpu()


# ---- objects of a video ----

def video(args):
    """Objects of a first frame followed through the video by patch features, and their J and F."""
    listed = Path(args.data_path, "ImageSets", "2017", "val.txt")
    names = args.sequences or (read_names(listed) if listed.is_file() else None)
    sequences = find_sequences(args.data_path, names)
    model, _, origin = open_backbone(args, needs="patch tokens", precision=args.precision)
    output = output_folder(origin, args, "video")
    output.mkdir(parents=True, exist_ok=True)
    flags = ("image_size", "n_last_frames", "size_mask_neighborhood", "topk", "temperature", "precision")
    origin |= dict(data_path=os.path.abspath(args.data_path)) | {name: getattr(args, name) for name in flags}
    before, failed = scores_before(output / "result.json", origin), []
    write_json(output / "result.json", origin | {"sequences": before})  # what another command found no longer holds
    scores = {name: before[name] for name in sequences if name in before}
    if scores:
        print(f"{output} has {len(scores)} of {len(sequences)} sequences already")
    to_do = {name: frames for name, frames in sequences.items() if name not in scores}
    with tqdm(total=sum(len(frames) - 1 for frames in to_do.values()), unit="frame", leave=False,
              disable=not sys.stderr.isatty()) as bar:
        for name, frames in to_do.items():
            bar.set_description(name)
            try:
                scores[name] = follow_sequence(model, frames, output / name, args, bar)
            except ImageReadError as error:
                failed.append(str(error))
                tqdm.write(f"{name}: left out, {error}")
                continue
            tqdm.write(f"{name}: {score_line(scores[name].values())}")
            write_json(output / "result.json", origin | {"sequences": before | scores})
    objects = [score for by_object in scores.values() for score in by_object.values()]
    print(f"{len(scores)} sequences with {len(objects)} objects: {score_line(objects)}\nmasks and result.json are in "
          f"{output}")
    if failed:
        raise DataError(f"{len(failed)} of {len(sequences)} sequences could not be followed to their end; the first: "
                        f"{failed[0]}")


def scores_before(path, origin):
    """What commands with the same flags have already found; nothing if there were none, or the file is damaged."""
    try:
        result = json.loads(path.read_text())
        for scores in result["sequences"].values():
            score_line(scores.values())
        return result["sequences"] if all(result[name] == origin[name] for name in origin.keys() - {"ckpt"}) else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def follow_sequence(model, frames, folder, args, bar):
    """Write the mask of each frame into a folder: {object: {"J": ..., "F": ...}}, empty without masks to judge by.

    Raises:
        Unreadable: a frame or a mask cannot be used; the masks of the frames before it are written.
    """
    size, p = read_image(frames[0]).size, model.patch_size
    values, palette, _ = read_mask(mask_path(frames[0]), size)
    classes = np.unique(np.append(values, 0))  # object numbers; class 0 is the ground
    if len(classes) == 1:
        raise ImageReadError(f"{mask_path(frames[0])}: holds no object")
    rows, cols = grid_of(*size, args.image_size, p)
    first = mask_to_labels(torch.from_numpy(np.searchsorted(classes, values)), len(classes), rows, cols).to(args.device)
    read = partial(read_frame, size=size, height=rows * p, width=cols * p)
    loader = torch.utils.data.DataLoader(FallibleDataset(frames, read), batch_size=None, num_workers=args.num_workers)
    features = (patch_features(model, frame, args) for frame in loader)
    folder.mkdir(exist_ok=True)
    save_mask(folder / f"{frames[0].stem}.png", values, palette)
    found = {}
    for frame, labels in zip(frames[1:], propagate_labels(features, first, args.n_last_frames, args.topk,
                                                args.size_mask_neighborhood, args.temperature)):
        mask = Image.fromarray(labels_to_mask(labels, rows * p, cols * p).byte().cpu().numpy())
        found[frame] = classes[np.asarray(mask.resize(size, Image.Resampling.NEAREST))]
        save_mask(folder / f"{frame.stem}.png", found[frame], palette)
        bar.update()
    return score_objects(found, classes[1:].tolist(), size)


def grid_of(width, height, shorter, p):
    """Rows and columns of patches for a frame: its longer side is cut to a multiple of 64 pixels, as was published."""
    longer = max(width, height) * shorter // min(width, height)
    step = 64 if 64 % p == 0 else p
    short, long = shorter // p, longer // step * step // p
    if not short or not long:
        raise DataError(f"--image_size {shorter}: less than a patch of a frame of {width} x {height} pixels")
    return (short, long) if height <= width else (long, short)


def read_frame(path, size, height, width):
    """A frame of `size` pixels as [1, 3, height, width].

    It is resized as in the published evaluation: bilinear without antialiasing, to whole levels. Its slip in the red
    channel, a standard deviation of 0.228 for 0.229, is not repeated.
    """
    image = read_image(path)
    if image.size != size:
        raise ImageReadError(f"{path}: {image.width} x {image.height} pixels, the first frame has {size[0]} x {size[1]}")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    return normalize(F.interpolate(pixels, size=(height, width), mode="bilinear").round() / 255)


@torch.no_grad()
def patch_features(model, image, args):
    """Image [1, 3, H, W] -> the last block's patch tokens [H/p, W/p, D]; Unreadable if it is a message instead."""
    if isinstance(image, str):
        raise ImageReadError(image)
    with autocast(torch.device(args.device), args.precision):
        tokens = model.get_intermediate_layers(image.to(args.device))[0][0, 1:]
    return tokens.unflatten(0, (image.shape[-2] // model.patch_size, -1))


def score_objects(found, numbers, size):
    """J and F over time of the objects of the first frame, as DAVIS has them: {number: {"J": ..., "F": ...}}.

    Of the frames that have masks the first and the last do not count, and pixels that nobody labelled are ground.

    Args:
        found: {path of each frame but the first: object numbers [H, W]}.
    """
    masked = [frame for frame in found if mask_path(frame).is_file()][:-1]
    truths = {frame: read_mask(mask_path(frame), size)[0] for frame in masked}
    result = {}
    for number in numbers if masked else []:
        pairs = [[torch.from_numpy(mask == number) for mask in (found[frame], truths[frame])] for frame in masked]
        result[str(number)] = {name: summarize_over_time(torch.stack([measure(*pair) for pair in pairs]))
                               for name, measure in (("J", jaccard), ("F", boundary_f))}
    return result


def score_line(scores):
    """Means of J and F over objects, percent; J&F is the mean of both."""
    if not scores:
        return "no masks between the first frame and the last to judge by"
    means = {name: {of: 100 * sum(score[name][of] for score in scores) / len(scores)
                    for of in ("mean", "recall", "decay")} for name in ("J", "F")}
    return f"J&F {(means['J']['mean'] + means['F']['mean']) / 2:.1f}, " + ", ".join(
        "{} {mean:.1f} (recall {recall:.1f}, decay {decay:.1f})".format(name, **values)
        for name, values in means.items())


TASKS = {"masks": attention_masks, "video": video}


def main(args):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise DataError("one process does it: start it with python, not with torchrun")
    TASKS[args.task](args)


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, CheckpointError)
