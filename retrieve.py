"""Find pictures: the same landmark, copies of a picture, the ones that look most alike.

    python retrieve.py search --data_path /photos dog.jpg       # the nearest, and a sheet of them
    python retrieve.py copies --ckpt dino_vitbase8_pretrain.pth --data_path /data/copydays
    python retrieve.py landmarks --ckpt dino_deitsmall16_pretrain.pth --data_path /data/roxford5k

`search` keeps the features of a folder in NAME.search beside the model file, and later only looks at pictures that
are new or changed. `copies` and `landmarks` are the paper's evaluations (Caron et al. 2021, section 4.2.1) with the
released scripts' settings, and write NAME.copies.json and NAME.landmarks.json. Extraction is shared by the processes
that torchrun starts.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional as TF
from tqdm import tqdm

import cli
from augment import IMAGENET_MEAN, IMAGENET_STD
from batches import eval_loader, eval_view
from checkpoint import CheckpointError, open_backbone, place_beside
from cli import boolean, positive
from data import DataError, ImageTree, open_rgb
from descriptor import cls_and_gem, learn_whitening, multi_scale
from features import NothingReadable, extract_features
from gallery import bring_up_to_date
from ranking import judge, mean_judgement
from resume import write_json
from retrieval_data import pictures_in, read_copydays, read_landmarks
from sheet import contact_sheet

KS = (1, 5, 10)  # ranks at which precision is said


def parse_args(argv=None):
    parser = cli.parser("retrieve.py", __doc__)
    tasks = parser.add_subparsers(prog="retrieve.py", dest="task", required=True, metavar="TASK")
    subs = {name: tasks.add_parser(name, help=task.__doc__, description=task.__doc__, usage=argparse.SUPPRESS,
                                   allow_abbrev=False) for name, task in TASKS.items()}
    for name, sub in subs.items():
        cli.add_model_flags(sub)
        sub.add_argument("--data_path", required=True, metavar="DIR", help={
            "search": "pictures to look among, at any depth",
            "copies": "with original/ and strong/, jpegqual/N/, crops/N/; a copy has the first four characters of its "
                      "original's name",
            "landmarks": "with gnd_*.pkl and jpg/, or a folder of such folders"}[name])
        sub.add_argument("--output_dir", metavar="DIR", help="folder for what is written (default: " + (
            "NAME.search beside the model file)" if name == "search" else "that of the model file)"))
    add = subs["search"].add_argument
    add("query", nargs="+", help="pictures to look for")
    add("--nearest", type=positive, default=11, metavar="N", help="how many to show (default: 11)")
    add("--image_size", type=positive, metavar="PIXELS",
        help="side of the square that is compared (default: the size the model was trained at)")
    add("--batch_size_per_gpu", type=positive, default=128, metavar="B", help="pictures a pass (default: 128)")
    add = subs["copies"].add_argument
    add("--image_size", type=positive, default=320, metavar="PIXELS",
        help="side of the square that a picture is squeezed into (default: 320)")
    add("--distractors", metavar="DIR", help="pictures that are copied by none, to look among as well")
    add("--batch_size_per_gpu", type=positive, default=16, metavar="B", help="pictures a pass (default: 16)")
    add = subs["landmarks"].add_argument
    add("--image_size", type=positive, default=512, metavar="PIXELS", help="longer side (default: 512)")
    add("--multiscale", type=boolean, nargs="?", const=True, default=True, metavar="X",
        help="sum of the features at 1, 0.71 and 0.5 of that size (default: true)")
    add("--crop_queries", action="store_true",
        help="cut queries to the landmark, as the benchmark's authors ask; the released script does not")
    for name in ("copies", "landmarks"):
        subs[name].add_argument("--whitening", metavar="DIR", help="other pictures, thousands of them, to learn a "
                                                                   "whitening from (default: none)")
    for sub in subs.values():
        cli.add_machine_flags(sub)
    return parser.parse_args(argv)


# ---- features of pictures ----

class Files(torch.utils.data.Dataset):
    """(picture, its number), cut to its box (left, top, right, bottom) where there are boxes."""

    def __init__(self, paths, boxes=None):
        self.paths, self.boxes = paths, boxes

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image = open_rgb(self.paths[i])
        return image.crop(self.boxes[i]) if self.boxes else image, i


class Extractor:
    """Files -> features, over all processes."""

    def __init__(self, args):
        self.rank, self.world_size, self.device = cli.start_processes(args.device)
        backbone, self.info, self.origin = open_backbone(args, self.say)
        self.backbone, self.patch_size = backbone.to(self.device), backbone.patch_size
        self.trained_size = backbone.grid[0] * self.patch_size
        self.num_workers = args.num_workers

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)

    def require_patches(self, size):
        if size % self.patch_size:
            raise DataError(f"--image_size {size} is not a multiple of the model's patch size {self.patch_size}")

    def __call__(self, paths, model, view, size, batch_size, boxes=None):
        """Features [M, D] of those that can be read, their numbers [M], and messages on the others."""
        loader = eval_loader(Files(paths, boxes), size, batch_size, self.num_workers, self.rank, self.world_size, view)
        with tqdm(total=len(paths), unit="img", leave=False,
                  disable=self.rank > 0 or not sys.stderr.isatty()) as bar:
            try:
                return extract_features(model, loader, self.device, lambda count: bar.update(count * self.world_size))
            except NothingReadable as error:
                return torch.empty(0, 1), torch.empty(0, dtype=torch.int64), error.unreadable

    def all_of(self, paths, *how, **kwargs):
        """Features of all, where none may be left out; raises DataError if one cannot be read."""
        features, _, unreadable = self(paths, *how, **kwargs)
        if unreadable:
            raise DataError(f"{len(unreadable)} of {len(paths)} pictures cannot be read; the first: {unreadable[0]}")
        return features


def squeezed(image, size):
    """RGB image -> [3, size, size], bicubic, whatever its shape."""
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    return TF.normalize(TF.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)


def within(image, size):
    """RGB image -> [3, H, W], its longer side no more than size, as Pillow's thumbnails with Lanczos are."""
    image = image.copy()
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return TF.normalize(TF.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)


def whitened(extract, args, how, *parts):
    """Parts of features [M, D], of length 1, after the whitening that --whitening asks for."""
    if args.whitening:
        others, _, unreadable = extract(pictures_in(args.whitening), *how)
        extract.say(f"whitening learnt from {len(others)} pictures of {args.whitening}"
                    + f", {len(unreadable)} unreadable" * bool(unreadable))
        if len(others) < others.shape[1]:
            extract.say(f"that is less than the {others.shape[1]} features have directions: it may do harm")
        parts = map(learn_whitening(others), parts)
    return [F.normalize(part, dim=1) for part in parts]


def write_result(extract, args, ending, **result):
    path = place_beside(extract.origin, args.checkpoint_key, ending)
    path = Path(args.output_dir or path.parent) / path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, extract.origin | result)
    print(f"written to {path}")


# ---- copies ----

def copies(args):
    """Copies of pictures found among the originals: Copydays, CLS and pooled patch tokens."""
    originals, blocks = read_copydays(args.data_path)
    extract = Extractor(args)
    extract.require_patches(args.image_size)
    how = (lambda x: cls_and_gem(extract.backbone, x)), squeezed, args.image_size, args.batch_size_per_gpu
    database = extract.all_of(originals, *how)
    if args.distractors:
        others, _, unreadable = extract(pictures_in(args.distractors), *how)
        database = torch.cat((database, others))
        extract.say(f"{len(others)} distractors" + f", {len(unreadable)} unreadable" * bool(unreadable))
    queries = [extract.all_of(paths, *how) for paths, _ in blocks.values()]
    database, *queries = whitened(extract, args, how, database, *queries)
    if extract.rank > 0:
        return
    print(f"mAP of copies among {len(database)} pictures, {args.image_size} pixels")
    table = {}
    for x, (name, (_, positives)) in zip(queries, blocks.items()):
        orders = (x @ database.T).argsort(dim=1, descending=True)
        table[name] = 100 * mean_judgement(map(judge, orders, positives))[0]
        print(f"{name:12} {len(x):5} queries  {table[name]:5.1f}")
    flags = {name: getattr(args, name) for name in ("data_path", "image_size", "distractors", "whitening")}
    write_result(extract, args, "copies.json", **flags, database=len(database), mAP=table)


# ---- landmarks ----

def landmarks(args):
    """The same landmark found again: revisited Oxford and Paris, multi-scale CLS."""
    root = Path(args.data_path)
    files = sorted(root.glob("gnd_*.pkl")) or sorted(root.glob("*/gnd_*.pkl"))
    if not files:
        raise DataError(f"{root}: expected gnd_roxford5k.pkl or gnd_rparis6k.pkl, and jpg/ beside it")
    truths = [read_landmarks(file) for file in files]
    extract = Extractor(args)

    def model(x):
        return multi_scale(extract.backbone, x, extract.patch_size, *() if args.multiscale else [(1.0,)])

    how, result = (model, within, args.image_size, 1), {}
    for truth in truths:
        boxes = truth.boxes if args.crop_queries else None
        database, queries = whitened(extract, args, how, extract.all_of(truth.database, *how),
                                     extract.all_of(truth.queries, *how, boxes=boxes))
        if extract.rank == 0:
            orders = (queries @ database.T).argsort(dim=1, descending=True)
            result[truth.name] = judge_landmarks(truth, orders)
    if extract.rank == 0:
        flags = ("data_path", "image_size", "multiscale", "crop_queries", "whitening")
        write_result(extract, args, "landmarks.json", **{name: getattr(args, name) for name in flags}, result=result)


LEVELS = {"easy": (["easy"], ["hard", "junk"]), "medium": (["easy", "hard"], ["junk"]),
          "hard": (["hard"], ["easy", "junk"])}  # what should be found, and what is passed over


def judge_landmarks(truth, orders):
    """Table of one benchmark, printed: {level: {"mAP": ..., "mP@1": ...}} in percent."""
    result = {}
    print(f"{truth.name}: {len(orders)} queries among {orders.shape[1]} pictures\n{'':8}   mAP"
          + "".join(f"{f'mP@{k}':>7}" for k in KS))
    for level, parts in LEVELS.items():
        judgements = [judge(order, *(sum((answer[name] for name in names), []) for names in parts), KS)
                      for order, answer in zip(orders, truth.answers)]
        if not any(judgements):
            print(f"{level:8}  no query has a picture to find")
            continue
        ap, precisions = mean_judgement(judgements)
        result[level] = {name: 100 * x for name, x in zip(("mAP", *(f"mP@{k}" for k in KS)), (ap, *precisions))}
        print(f"{level:8} {100 * ap:5.1f}" + "".join(f"{100 * x:7.1f}" for x in precisions))
    return result


# ---- search ----

def search(args):
    """The pictures of a folder that look most like others, and a sheet of them."""
    extract = Extractor(args)
    size = args.image_size or extract.trained_size
    extract.require_patches(size)
    how = (lambda x: F.normalize(extract.backbone(x), dim=1)), eval_view, size, args.batch_size_per_gpu
    output = Path(args.output_dir or place_beside(extract.origin, args.checkpoint_key, "search"))
    queries, numbers, unreadable = extract(args.query, *how)
    features, names = gallery(extract, args.data_path, output, *how)
    if extract.rank > 0:
        return
    for query, i in zip(queries, numbers.tolist()):
        path, scores = args.query[i], features @ query
        found = [(scores[j].item(), names[j]) for j in scores.topk(min(args.nearest + 1, len(names))).indices
                 if not os.path.samefile(names[j], path)][:args.nearest]
        print("\n".join([f"{path}:", *(f"  {score:6.3f}  {name}" for score, name in found)]))
        sheet = output / f"{os.path.basename(path)}{f'.{i}' * (len(args.query) > 1)}.nearest.png"
        contact_sheet([(open_rgb(path), "query")] + [(open_rgb(name), f"{score:.3f}  {os.path.basename(name)}")
                                                     for score, name in found]).save(sheet)
        print(f"  -> {sheet}")
    if unreadable:
        raise DataError(f"{len(unreadable)} of {len(args.query)} queries cannot be read; the first: {unreadable[0]}")


def gallery(extract, folder, output, model, view, size, batch_size):
    """Features of the pictures below a folder and their paths; kept in a file of the folder's name."""
    root, names = os.path.realpath(folder), ImageTree(folder).files
    about = [extract.origin["sha256"], extract.origin["network"], extract.origin["untrained"], root, size]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    output.mkdir(parents=True, exist_ok=True)
    features, names = bring_up_to_date(output / f"{os.path.basename(root)}-{digest}.safetensors", root, names,
                                       lambda paths: extract(paths, model, view, size, batch_size), extract.say)
    return features, [os.path.join(folder, name) for name in names]


TASKS = {"search": search, "copies": copies, "landmarks": landmarks}


def main(args):
    TASKS[args.task](args)


if __name__ == "__main__":
    cli.run(main, parse_args, DataError, CheckpointError)
