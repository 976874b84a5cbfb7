"""Find pictures: the same landmark, copies of a picture, the ones that look most alike.

    python retrieve.py search --data_path /photos dog.jpg       # the nearest, and a sheet of them
    python retrieve.py copies --ckpt dino_vitbase8_pretrain.pth --data_path /data/copydays
    python retrieve.py landmarks --ckpt dino_deitsmall16_pretrain.pth --data_path /data/roxford5k

`search` keeps the features of a folder in NAME.search beside the model file, and later only looks at pictures that
are new or changed. `copies` and `landmarks` are the paper's evaluations (Caron et al. 2021, section 4.2.1) with the
released scripts' settings, and write NAME.copies.json and NAME.landmarks.json. Extraction is shared by the processes
that torchrun starts.
"""

import hashlib
import itertools
import json
import os
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common import cli, distributed
from common.checkpoint import check_writable, write_json
from common.cli import boolean, positive_int
from common.weights import CheckpointError, open_backbone, output_file, output_folder, resolve_image_size
from data.datasets import DataError, ImageFolder
from data.images import ImageReadError, read_image
from data.loaders import build_eval_loader, center_crop_view, normalize
from data.retrieval import list_images, read_copydays, read_landmarks
from evaluation.descriptor import SCALES, cls_and_gem_features, fit_whitening, multi_scale_features
from evaluation.features import NoImagesError, extract_features
from evaluation.image_index import update_index
from evaluation.ranking import average_precision, mean_average_precision
from plotting.sheet import contact_sheet

KS = (1, 5, 10)  # ranks at which precision is said


def parse_args(argv=None):
    parser = cli.build_parser("retrieve.py", __doc__)
    tasks = cli.add_subcommands(parser, TASKS)
    for name, task in tasks.items():
        cli.add_model_flags(task)
        task.add_argument("--data_path", required=True, metavar="DIR", help={
            "search": "folder of the pictures to look among, at any depth",
            "copies": "folder that holds original/ and strong/, jpegqual/N/ or crops/N/; a copy's name begins with the "
                      "same four characters as its original's",
            "landmarks": "folder that holds gnd_*.pkl and jpg/, or a folder of such folders"}[name])
        task.add_argument("--output_dir", metavar="DIR", help="folder for what is written (default: " + (
            "NAME.search beside the model file)" if name == "search" else "that of the model file)"))
    add = tasks["search"].add_argument
    add("query", nargs="+", help="pictures to look for; a query that lies in the folder does not find itself")
    add("--nearest", type=positive_int, default=11, metavar="N", help="how many to show (default: 11)")
    add("--image_size", type=positive_int, metavar="PIXELS",
        help="side of the square that is compared (default: the size the model was trained at)")
    add = tasks["copies"].add_argument
    add("--image_size", type=positive_int, default=320, metavar="PIXELS",
        help="side of the square that a picture is squeezed into (default: 320)")
    add("--distractors", metavar="DIR", help="pictures that none is a copy of, to look among as well (default: none)")
    add = tasks["landmarks"].add_argument
    add("--image_size", type=positive_int, default=512, metavar="PIXELS", help="longer side (default: 512)")
    add("--multiscale", type=boolean, nargs="?", const=True, default=True, metavar="X",
        help="sum of the features at 1, 0.71 and 0.5 of that size (default: true)")
    add("--crop_queries", action="store_true",
        help="cut queries to the landmark, as the benchmark's authors ask; the released script does not")
    for name in ("copies", "landmarks"):
        tasks[name].add_argument("--whitening", metavar="DIR", help="other pictures, thousands of them, to learn a "
                                                                    "whitening from (default: none)")
    for name, count in (("search", 128), ("copies", 16)):
        tasks[name].add_argument("--batch_size_per_gpu", type=positive_int, default=count, metavar="B",
                                 help=f"pictures per process and pass (default: {count})")
    for task in tasks.values():
        cli.add_device_flags(task)
    return parser.parse_args(argv)


# ---- features of pictures ----

class Files(torch.utils.data.Dataset):
    """(picture, its number), of paths; with boxes (left, top, right, bottom) what lies in them."""

    def __init__(self, paths, boxes=None, upright=True):
        self.paths, self.boxes, self.upright = paths, boxes, upright

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image = read_image(self.paths[i], upright=self.upright)
        if self.boxes:
            left, top, right, bottom = self.boxes[i]
            box = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
            if box[0] >= box[2] or box[1] >= box[3]:
                raise ImageReadError(f"{self.paths[i]}: the box {self.boxes[i]} lies outside its {image.width} x "
                                 f"{image.height} pixels")
            image = image.crop(box)
        return image, i


class Looker:
    """Pictures -> features, over all processes that torchrun started.

    Args:
        describe: (backbone, images [B, 3, H, W]) -> features [B, D].
        view: (RGB image, size) -> [3, H, W].
        needs: see `open_backbone`.
    """

    def __init__(self, args, describe, view, batch_size, upright=True, needs=""):
        self.rank, self.world_size, self.device = distributed.init_distributed(args.device)
        self.backbone, _, self.origin = open_backbone(args, self.device, needs)
        self.size = args.image_size if view is within else resolve_image_size(args.image_size, self.backbone)
        self.describe, self.view, self.batch_size, self.upright = describe, view, batch_size, upright
        self.num_workers = args.num_workers

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)

    def look(self, paths, boxes=None):
        """Features [M, D] of the pictures that can be read, their numbers [M], and messages on the others."""
        loader = build_eval_loader(Files(paths, boxes, self.upright), self.size, self.batch_size, self.num_workers, self.rank,
                             self.world_size, self.view)
        try:
            return extract_features(partial(self.describe, self.backbone), loader, self.device, total=len(paths))
        except NoImagesError as error:
            return torch.empty(0, 1), torch.empty(0, dtype=torch.int64), error.unreadable

    def look_at_all(self, paths, boxes=None):
        """Features of pictures of which none may be left out; raises DataError if one cannot be read."""
        features, _, unreadable = self.look(paths, boxes)
        if unreadable:
            raise DataError(f"{len(unreadable)} of {len(paths)} pictures cannot be read; the first: {unreadable[0]}")
        return features

    def look_at_others(self, folder, what):
        """Features of a folder's pictures, but for those that cannot be read, which are counted."""
        features, _, unreadable = self.look(list_images(folder))
        if not len(features):
            raise DataError(f"{folder}: none of its pictures can be read; the last: {unreadable[-1]}")
        self.say(f"{what}: {len(features)} pictures of {folder}" + f", {len(unreadable)} unreadable" * bool(unreadable))
        return features


def squeezed(image, size):
    """RGB image -> [3, size, size], bicubic, whatever its shape."""
    return normalize(image.resize((size, size), Image.Resampling.BICUBIC))


def within(image, size):
    """RGB image -> [3, H, W], its longer side no more than size, as Pillow's thumbnails with Lanczos are."""
    image = image.copy()
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return normalize(image)


def normaliser(looker, folder):
    """Features -> the same of length 1, whitened before if there is a folder of pictures to learn that from."""
    if not folder:
        return lambda x: F.normalize(x, dim=1)
    others = looker.look_at_others(folder, "whitening")
    if len(others) < others.shape[1]:
        looker.say(f"that is less than the {others.shape[1]} features have directions: it may do harm")
    whiten = fit_whitening(others)
    return lambda x: F.normalize(whiten(x), dim=1)


def write_result(looker, path, args, *flags, **result):
    write_json(path, looker.origin | {name: getattr(args, name) for name in flags} | result)
    print(f"written to {path}")


# ---- copies ----

def copies(args):
    """Copies of pictures found among the originals: Copydays, CLS and pooled patch tokens."""
    originals, blocks = read_copydays(args.data_path)
    looker = Looker(args, cls_and_gem_features, squeezed, args.batch_size_per_gpu, needs="patch tokens")
    path = output_file(looker.origin, args, "copies.json")
    queries = {name: looker.look_at_all(paths) for name, (paths, _) in blocks.items()}
    database = looker.look_at_all(originals)
    if args.distractors:
        database = torch.cat((database, looker.look_at_others(args.distractors, "distractors")))
    normalise = normaliser(looker, args.whitening)
    if looker.rank > 0:
        return
    database, table = normalise(database), {}
    print(f"mAP of copies among {len(database)} pictures, {looker.size} pixels")
    for name, (_, positives) in blocks.items():
        # As released, what comes after the first 20 is not looked at.
        orders = (normalise(queries[name]) @ database.T).topk(min(20, len(database))).indices
        table[name] = 100 * mean_average_precision(map(average_precision, orders, positives))[0]
        print(f"{name:12} {len(orders):5} queries  {table[name]:5.1f}")
    write_result(looker, path, args, "data_path", "image_size", "distractors", "whitening", database=len(database),
                 mAP=table)


# ---- landmarks ----

def landmarks(args):
    """The same landmark found again: revisited Oxford and Paris, multi-scale CLS."""
    root = Path(args.data_path)
    files = sorted(root.glob("gnd_*.pkl")) or sorted(root.glob("[!.]*/gnd_*.pkl"))
    if not files:
        raise DataError(f"{root}: expected gnd_roxford5k.pkl or gnd_rparis6k.pkl, and jpg/ beside it")
    truths = {str(file.relative_to(root)): read_landmarks(file) for file in files}
    scales = SCALES if args.multiscale else (1.0,)
    # Sizes differ, so pictures come one by one; and as they lie in the file, for so the boxes were drawn.
    looker = Looker(args, partial(multi_scale_features, scales=scales), within, batch_size=1, upright=False,
                    needs="views of any size")
    path = output_file(looker.origin, args, "landmarks.json")
    normalise, result = normaliser(looker, args.whitening), {}
    for file, truth in truths.items():
        queries = looker.look_at_all(truth.queries, truth.boxes if args.crop_queries else None)
        database = looker.look_at_all(truth.database)
        if looker.rank == 0:
            orders = (normalise(queries) @ normalise(database).T).argsort(dim=1, descending=True)
            result[file] = judge_landmarks(file, orders, truth.answers)
    if looker.rank == 0:
        write_result(looker, path, args, "data_path", "image_size", "multiscale", "crop_queries", "whitening",
                     result=result)


LEVELS = {"easy": (["easy"], ["hard", "junk"]), "medium": (["easy", "hard"], ["junk"]),
          "hard": (["hard"], ["easy", "junk"])}  # what should be found, and what is passed over


def judge_landmarks(name, orders, answers):
    """Table of one benchmark, printed: {level: {"mAP": ..., "mP@1": ...}} in percent."""
    print(f"{name}: {len(orders)} queries among {orders.shape[1]} pictures\n{'':8}   mAP"
          + "".join(f"{f'mP@{k}':>7}" for k in KS))
    result = {}
    for level, (wanted, passed_over) in LEVELS.items():
        judgements = []
        for order, answer in zip(orders, answers):
            positives, junk = ([i for part in parts for i in answer[part]] for parts in (wanted, passed_over))
            judgements.append(average_precision(order, positives, junk, KS))
        if not any(judgements):
            print(f"{level:8}  no query has a picture to find")
            continue
        ap, precisions = mean_average_precision(judgements)
        result[level] = {"mAP": 100 * ap} | {f"mP@{k}": 100 * x for k, x in zip(KS, precisions)}
        print(f"{level:8} {100 * ap:5.1f}" + "".join(f"{100 * x:7.1f}" for x in precisions))
    return result


# ---- search ----

def search(args):
    """The pictures of a folder that look most like others, and a sheet of them."""
    looker = Looker(args, unit_cls, center_crop_view, args.batch_size_per_gpu)
    output = output_folder(looker.origin, args, "search")
    queries, numbers, unreadable = looker.look(args.query)
    features, paths = gallery(looker, args.data_path, output)
    if looker.rank > 0:
        return
    for query, i in zip(queries, numbers.tolist()):
        path, scores = args.query[i], features @ query
        others = (j for j in scores.argsort(descending=True).tolist() if not same_file(paths[j], path))
        found = [(scores[j].item(), paths[j]) for j in itertools.islice(others, args.nearest)]
        print("\n".join([f"{path}:", *(f"  {score:6.3f}  {name}" for score, name in found)]))
        name = os.path.basename(path)[:60] + f".{i}" * (len(args.query) > 1) + ".nearest.png"
        contact_sheet([(shown(path), "query")] + [(shown(name), f"{score:.3f}  {os.path.basename(name)}")
                                                  for score, name in found]).save(output / name)
        print(f"  -> {output / name}")
    if unreadable:
        raise DataError(f"{len(unreadable)} of {len(args.query)} queries cannot be read; the first: {unreadable[0]}")


def unit_cls(backbone, images):
    """Images -> CLS features of length 1, so that their products are cosines."""
    return F.normalize(backbone(images), dim=1)


def gallery(looker, folder, output):
    """Features of the pictures below a folder and their paths; kept in a file of the folder's name."""
    root, written = os.path.realpath(folder), os.path.join(os.path.realpath(output), "")
    names = [name for name in ImageFolder(folder).files if not os.path.join(root, name).startswith(written)]
    about = [looker.origin["sha256"], looker.origin["network"], looker.origin["untrained"], root, looker.size]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    output.mkdir(parents=True, exist_ok=True)
    check_writable(output)
    features, names = update_index(output / f"{os.path.basename(root)[:60]}-{digest}.safetensors", root, names,
                                       looker.look, looker.say)
    if not names:
        raise DataError(f"{folder}: none of its pictures can be read")
    return features, [os.path.join(folder, name) for name in names]


def same_file(a, b):
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def shown(path):
    """The picture, or a grey one if it is gone since it was looked at."""
    try:
        return read_image(path)
    except ImageReadError:
        return Image.new("RGB", (180, 180), "lightgrey")


TASKS = {"search": search, "copies": copies, "landmarks": landmarks}


def main(args):
    TASKS[args.task](args)


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, CheckpointError)
