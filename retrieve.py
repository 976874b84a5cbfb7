"""Image retrieval: nearest images of a folder, copy detection (Copydays), landmarks (revisited Oxford and Paris).

    python retrieve.py search --data_path /photos dog.jpg       # nearest images, and a contact sheet of them
    python retrieve.py copies --ckpt dino_vitbase8_pretrain.pth --data_path /data/copydays
    python retrieve.py landmarks --ckpt dino_deitsmall16_pretrain.pth --data_path /data/roxford5k

The folder of Copydays holds original/, and strong/, jpegqual/N/ or crops/N/; copies share the first four characters of
their original's name. The folder of landmarks holds gnd_*.pkl and jpg/, or folders of that kind.
`search` keeps an index of the folder's features in NAME.search beside the model file; later runs extract features of
new and changed images only. Contact sheets are NAME.search/DATA/QUERY.nearest.png. `copies` and `landmarks` are the
paper's evaluations (Caron et al. 2021, section 4.2.1) with the settings of the released commands; they write
NAME.copies.DATA.json and NAME.landmarks.DATA.json. Under torchrun, feature extraction is split over the processes.
"""

import common  # noqa: F401 (first: it checks the version of Python)

# isort: split
import hashlib
import itertools
import json
import os
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from common import cli, distributed
from common.checkpoint import CheckpointError
from common.files import create_folder, number_name, write_json
from common.logger import log
from common.paths import output_folder, result_file
from common.weights import open_backbone, resolve_image_size
from data import loaders, retrieval
from data.datasets import DataError, data_name, make_absolute, open_images
from data.folders import ImageFiles
from data.images import read_image, show_channels
from evaluation.descriptor import SCALES, cls_and_gem_features, fit_whitening, multi_scale_features
from evaluation.features import extract_features
from evaluation.image_index import update_index
from evaluation.ranking import KS, average_precision, mean_average_precision
from plotting.sheet import describe_model, draw_nearest


def parse_args(argv=None):
    parser = cli.build_parser("retrieve.py", __doc__)
    search, copies, landmarks = cli.add_subcommands(parser, TASKS).values()
    for task in (search, copies, landmarks):
        cli.add_model_flags(task)
        task.add_argument("--data_path", required=True, metavar="DIR", help="images (search: or shards), or benchmark")
    cli.add_cache_flag(search)
    cli.add_show_channels_flag(search)
    search.add_argument("query", nargs="+", help="query images; one that lies in the folder is not its own result")
    search.add_argument("--image_size", type=cli.image_side, help="side of the center crop (default: as in training)")
    search.add_argument("--nearest", type=cli.positive_int, default=11, help="number of results")
    search.add_argument("--batch_size_per_gpu", type=cli.positive_int, default=128, help="batch size per GPU")
    copies.add_argument("--image_size", type=cli.image_side, default=320, help="side of the square after resizing")
    copies.add_argument("--distractors", metavar="DIR", help="images to add to the database")
    copies.add_argument("--batch_size_per_gpu", type=cli.positive_int, default=16, help="batch size per GPU")
    landmarks.add_argument("--image_size", type=cli.image_side, default=512, help="longer side")
    landmarks.add_argument("--multiscale", type=cli.boolean, nargs="?", const=True, default=True, help="sum 3 scales")
    landmarks.add_argument("--crop_queries", action="store_true", help="crop queries to the landmark (release: false)")
    landmarks.set_defaults(batch_size_per_gpu=1)  # images differ in size
    for task in (copies, landmarks):
        task.add_argument("--whitening", metavar="DIR", help="images to fit PCA whitening to, thousands of them")
    args = parser.parse_args(argv)
    cli.check_show_channels(parser, args)
    return args


# ---- features ----

class ImageEncoder:
    """Features of image files, extracted by all ranks together.

    Args:
        extract: (backbone, images [B, C, H, W]) -> features [B, D].
        view: (image, size) -> [C, H, W].
        square: whether the size is the side of a square, and so must be a multiple of the patch size.
        upright: see `ImageFiles`.
        needs, rgb_only: see `open_backbone`.
    """

    def __init__(self, args, extract, view, square=True, upright=True, needs="", rgb_only=True):
        self.rank, _, self.device = distributed.init_distributed(args.device)
        self.backbone, self.info, self.origin = open_backbone(args, self.device, needs, rgb_only=rgb_only)
        self.size = resolve_image_size(args.image_size, self.backbone) if square else args.image_size
        self.args, self.extract, self.upright = args, extract, upright
        self.view = loaders.build_view(self.info, view)
        flags = ("image_size", "distractors", "whitening", "multiscale", "crop_queries")
        self.origin |= {name: value for name, value in vars(args).items() if name in flags}
        self.origin["data_path"] = make_absolute(args.data_path)
        self.result_path = result_file(self.origin, args, f"{args.task}.{data_name(args.data_path)}")

    def encode(self, paths, boxes=None):
        """As `encode_images`, of files."""
        return self.encode_images(ImageFiles(paths, boxes, self.upright, self.origin["value_range"]))

    def encode_images(self, images):
        """Features [M, D] of the readable images, their indices [M], messages on corrupt images."""
        features, _, *rest = extract_features(partial(self.extract, self.backbone), images, self.size, self.args,
                                              self.device, self.view, allow_none=True)
        return features, *rest

    def encode_all(self, paths, boxes=None):
        """Features of images of which none may be missing; raises DataError if one is corrupt."""
        features, _, corrupt = self.encode(paths, boxes)
        if corrupt:
            raise DataError(f"{len(corrupt)} of {len(paths)} images cannot be read; the first: {corrupt[0]}")
        return features

    def encode_folder(self, folder, purpose):
        """Features of the readable images of a folder."""
        features, _, corrupt = self.encode(retrieval.list_images(folder))
        log(f"{purpose}: {len(features)} images of {folder}, {len(corrupt)} corrupt")
        return features

    def write_result(self, **result):
        """Write results, with the flags and the origin of the model, to NAME.TASK.json."""
        if self.rank == 0:
            write_json(self.result_path, vars(self.args) | self.origin | result)
            print(f"wrote {self.result_path}")


def resize_to_square(image, size, **normalization):
    """RGB image -> [3, size, size], bicubic, normalized; the aspect ratio is not kept."""
    return loaders.normalize(image.resize((size, size), Image.Resampling.BICUBIC), **normalization)


def resize_longer_side(image, size, **normalization):
    """RGB image -> [3, H, W], Lanczos, normalized; the longer side is at most `size`."""
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return loaders.normalize(image, **normalization)


def build_normalizer(encoder, folder):
    """Function that L2-normalizes features, after whitening fitted to the images of a folder, if there is one."""
    if not folder:
        return F.normalize
    features = encoder.encode_folder(folder, "whitening")
    if len(features) < features.shape[1]:
        log(f"warning: fewer images than feature dimensions ({features.shape[1]}), whitening may do harm")
    whiten = fit_whitening(features)
    return lambda x: F.normalize(whiten(x))


# ---- copies ----

def evaluate_copies(args):
    """Copy detection on Copydays: mAP with CLS and GeM-pooled patch tokens."""
    originals, blocks = retrieval.read_copydays(args.data_path)
    encoder = ImageEncoder(args, cls_and_gem_features, resize_to_square, needs="patch tokens")
    database = encoder.encode_all(originals)
    if args.distractors:
        database = torch.cat((database, encoder.encode_folder(args.distractors, "distractors")))
    normalizer, mAP = build_normalizer(encoder, args.whitening), {}
    database = normalizer(database)
    log(f"mAP of copies in a database of {len(database)} images, {encoder.size} pixels")
    for name, (paths, positives) in blocks.items():
        # as in the released script, only the first 20 count
        orders = (normalizer(encoder.encode_all(paths)) @ database.T).topk(min(20, len(database))).indices
        mAP[name] = 100 * mean_average_precision(map(average_precision, orders, positives))[0]
        log(f"{name:12} {len(orders):5} queries  {mAP[name]:5.1f}")
    encoder.write_result(num_images=len(database), mAP=mAP)


# ---- landmarks ----

DIFFICULTIES = {"easy": (["easy"], ["hard", "junk"]), "medium": (["easy", "hard"], ["junk"]),
          "hard": (["hard"], ["easy", "junk"])}  # positives and ignored images (Radenovic et al. 2018, section 4)


def evaluate_landmarks(args):
    """Landmark retrieval on revisited Oxford and Paris: mAP and mP@k with multi-scale CLS features."""
    root = Path(args.data_path)
    files = sorted(root.glob("gnd_*.pkl")) or sorted(root.glob("[!.]*/gnd_*.pkl"))
    if not files:
        raise DataError(f"{root}: expected gnd_roxford5k.pkl or gnd_rparis6k.pkl, and jpg/ beside it")
    truths = {str(file.relative_to(root)): retrieval.read_landmarks(file) for file in files}
    extract = partial(multi_scale_features, scales=SCALES if args.multiscale else (1.0,))
    # not upright: boxes ignore EXIF
    encoder = ImageEncoder(args, extract, resize_longer_side, square=False, upright=False, needs="images of any size")
    normalizer, result = build_normalizer(encoder, args.whitening), {}
    for name, (paths, queries, boxes, relevance) in truths.items():
        queries = encoder.encode_all(queries, boxes if args.crop_queries else None)
        database = encoder.encode_all(paths)
        orders = (normalizer(queries) @ normalizer(database).T).argsort(dim=1, descending=True)
        log(f"{name}: {len(queries)} queries, database of {len(database)} images")
        result[name] = {}
        for level, parts in DIFFICULTIES.items():
            results = [average_precision(order, *([i for part in names for i in query[part]] for names in parts))
                       for order, query in zip(orders, relevance)]
            if any(results):
                mAP, precisions = mean_average_precision(results)
                values = {"mAP": 100 * mAP} | {f"mP@{k}": 100 * x for k, x in zip(KS, precisions)}
                log(f"{level:8}" + "".join(f"  {metric} {value:5.1f}" for metric, value in values.items()))
                result[name][level] = values
    encoder.write_result(result=result)


# ---- search ----

def search(args):
    """Nearest images of a folder or of shards by cosine similarity of CLS features, and a contact sheet of them."""
    encoder = ImageEncoder(args, lambda backbone, x: F.normalize(backbone(x)), loaders.center_crop_view, rgb_only=False)
    output, taken = output_folder(encoder.origin, args, "search"), []
    images, features, indices = index_images(encoder, args.data_path, output)
    queries, numbers, corrupt = encoder.encode_images(ImageFiles(args.query, value_range=images.value_range,
                                                                 channels=images.channels))
    if encoder.rank > 0:
        return
    create_folder(sheets := output / data_name(args.data_path))
    model = describe_model(encoder.origin, encoder.info, encoder.backbone.patch_size)

    def read(image):
        image = images[image][0] if isinstance(image, int) else read_image(
            image, value_range=images.value_range, channels=images.channels)
        return show_channels(image, args.show_channels)

    for query, number in zip(queries, numbers.tolist()):
        path, scores = args.query[number], features @ query
        others = ((indices[j], scores[j].item()) for j in scores.argsort(descending=True).tolist()
                  if not is_same_file(images.name(indices[j]), path))
        nearest = list(itertools.islice(others, args.nearest))
        print("\n".join([f"{path}:", *(f"  {score:6.3f}  {images.name(i)}" for i, score in nearest)]))
        sheet = sheets / f"{number_name(os.path.basename(path), taken)}.nearest.png"
        captions = [f"query: {os.path.basename(path)}"] + [
            f"{rank}: cosine {score:.3f} {images.key(i)}" for rank, (i, score) in enumerate(nearest, start=1)]
        draw_nearest([path, *(i for i, _ in nearest)], captions, read, 1200, model).save(sheet)
        print(f"  -> {sheet}")
    if corrupt:
        raise DataError(f"{len(corrupt)} of {len(args.query)} queries cannot be read; the first: {corrupt[0]}")


def is_same_file(path, other):
    return os.path.exists(path) and os.path.samefile(path, other)


def index_images(encoder, source, output):
    """Images of a folder or of shards, features [M, D] of the readable ones, and the indices [M] of these.

    The index is one file per model, source, image size and, of images of more than 8 bits, their black and white.
    """
    root = os.path.realpath(source)
    images = distributed.run_on_rank_zero_first(
        lambda: open_images([source], output, encoder.args.cache_dir, value_range=encoder.origin["value_range"],
                            channels=encoder.info["channels"]))
    log(f"{len(images):,} images in {source}{images.passed_over}")
    create_folder(output)
    key = [*(encoder.origin[name] for name in ("sha256", "network", "untrained")), root, encoder.size]
    digest = hashlib.sha256(json.dumps(key + [*(images.value_range or ())]).encode()).hexdigest()[:8]
    path = output / f"{os.path.basename(root)[:60]}-{digest}.safetensors"
    features, indices = update_index(path, images, encoder.encode_images, log)
    if not indices:
        raise DataError(f"{source}: no readable images")
    return images, features, indices


TASKS = {"search": search, "copies": evaluate_copies, "landmarks": evaluate_landmarks}


def main(args):
    TASKS[args.task](args)


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, CheckpointError)
