"""Judge the features of a trained backbone.

    python evaluate.py knn                                    # the newest run, on the data it was trained on
    python evaluate.py knn --ckpt dino_deitsmall16_pretrain.pth --data_path /data/imagenet
    torchrun --nproc_per_node=8 evaluate.py knn --ckpt runs/vits16/teacher.safetensors

`knn` classifies the held-out pictures by a weighted vote of their nearest neighbours among the others, top-1 and
top-5 for several numbers of neighbours. The table is also written beside the checkpoint, as NAME.knn.json. With
`--features FILE` the features are kept, and taken from there the next time.
"""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import cli
from batches import eval_loader
from checkpoint import CheckpointError, load_backbone, newest_model
from cli import positive, positive_float
from data import DataError, open_data
from knn import extract_features, knn_classifier
from resume import write_whole


def parse_args(argv=None):
    parser = cli.parser("evaluate.py", __doc__)
    parser.add_argument("task", choices=["knn"], help="how to judge")
    parser.add_argument("--ckpt", nargs="?", help="model file (default: teacher.safetensors of the newest run)")
    parser.add_argument("--checkpoint_key", choices=["teacher", "student"],
                        help="network to take from a full checkpoint (default: teacher)")
    parser.add_argument("--data_path", help="labelled pictures, named as for train.py (default: what the newest run "
                                            "was trained on; the built-in pictures if --ckpt says so)")
    parser.add_argument("--image_size", type=positive, metavar="PIXELS",
                        help="side of the square that is judged (default: the size the model was trained at)")
    parser.add_argument("--nb_knn", type=positive, nargs="+", default=[10, 20, 100, 200], metavar="K",
                        help="numbers of neighbours (default: 10 20 100 200; those beyond the data are clamped)")
    parser.add_argument("--temperature", type=positive_float, default=0.07, help="of the vote (default: 0.07)")
    parser.add_argument("--knn_memory_mb", type=positive, default=1024, metavar="MB",
                        help="bound on the similarities held at once (default: 1024)")
    parser.add_argument("--features", metavar="FILE", help="safetensors file to keep the features in; if it is there "
                                                           "they are taken from it")
    parser.add_argument("--batch_size_per_gpu", type=positive, default=128, metavar="B", help="(default: 128)")
    cli.add_machine_flags(parser)
    return parser.parse_args(argv)


FEATURES = ("bank", "bank_labels", "queries", "query_labels")


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_features(path, features, origin):
    """Write features and labels of both parts, and what they came from."""
    metadata = {name: json.dumps(value) for name, value in origin.items()}
    write_whole(path, lambda temporary: save_file(features, temporary, metadata))


def load_features(path, origin):
    """Read what `save_features` wrote.

    Raises:
        CheckpointError: the file is damaged, or holds the features of something else.
    """
    try:
        with safe_open(path, "pt") as file:
            features = {name: file.get_tensor(name) for name in FEATURES}
            found = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: no features, or damaged ({error})") from None
    for name, value in origin.items():
        if name != "ckpt" and found.get(name) != value:
            raise CheckpointError(f"{path}: holds features with {name} {found.get(name)}, not {value}: name another "
                                  f"--features, or delete it")
    for part in ("bank", "queries"):
        x, y = features[part], features[FEATURES[FEATURES.index(part) + 1]]
        if x.dim() != 2 or not x.is_floating_point() or y.shape != x.shape[:1] or y.dtype != torch.int64 or not len(x) \
                or not x.isfinite().all() or y.min() < 0:
            raise CheckpointError(f"{path}: its {part} are not features with labels")
    return features


def knn(args):
    """Features of both parts, each picture once over all processes, then the vote."""
    rank, world_size, device = cli.start_processes(args.device)
    say = print if rank == 0 else lambda text: None
    ckpt = args.ckpt or newest_model()
    backbone, info = load_backbone(ckpt, args.checkpoint_key, say)
    if backbone.in_chans != 3:
        raise CheckpointError(f"{ckpt}: takes {backbone.in_chans} channels, pictures here have 3")
    size = args.image_size or backbone.grid[0] * backbone.patch_size
    if size % backbone.patch_size:
        raise DataError(f"--image_size {size} is not a multiple of the model's patch size {backbone.patch_size}")
    data_path = args.data_path or info.get("data_path")
    if not (data_path and isinstance(data_path, str)):
        raise DataError(f"{ckpt} does not say what it was trained on: name labelled pictures with --data_path")
    if args.ckpt and not args.data_path and not re.fullmatch(r"shapes(:\d+)?", data_path):
        raise DataError(f"{ckpt} says that it was trained on {data_path}; what a file names is opened when you name it "
                        f"too: --data_path {data_path}")
    data = cli.rank_zero_first(lambda: open_data(data_path, download=bool(args.data_path)))
    if data.queries is None:
        raise DataError(f"{data_path}: no labels; expected one folder per class, best in train/ and val/")
    say(data.note)

    origin = dict(ckpt=str(ckpt), sha256=sha256(ckpt), data_path=data.path, image_size=size)
    features = load_features(args.features, origin) if args.features and os.path.exists(args.features) else None
    if features is None:
        features = {}
        for part, images in (("bank", data.bank), ("queries", data.queries)):
            loader = eval_loader(images, size, args.batch_size_per_gpu, args.num_workers, rank, world_size)
            with tqdm(total=len(loader.dataset), unit="img", disable=rank != 0 or not sys.stderr.isatty()) as bar:
                x, labels, unreadable = extract_features(backbone.to(device), loader, device, bar.update)
            features |= {part: x, {"bank": "bank_labels", "queries": "query_labels"}[part]: labels}
            for message in unreadable:
                say(f"skipped unreadable picture {message}")
        if args.features and rank == 0:
            save_features(args.features, features, origin)
            say(f"features written to {args.features}")
    else:
        say(f"features taken from {args.features}")
    scores = knn_classifier(*features.values(), args.nb_knn, args.temperature, args.knn_memory_mb, device)

    bank, queries = len(features["bank"]), len(features["queries"])
    say(f"k-NN of {ckpt}: {queries} pictures among {bank}, {size} pixels, temperature "
        f"{args.temperature}\n     k   top-1   top-5")
    for k, (top1, top5) in scores.items():
        say(f"{k:6d}  {top1:6.2f}  {top5:6.2f}")
    if rank == 0:
        result = Path(ckpt).with_suffix(".knn.json")
        table = {k: dict(top1=top1, top5=top5) for k, (top1, top5) in scores.items()}
        result.write_text(json.dumps(dict(
            ckpt=str(ckpt), data_path=data_path, image_size=size, temperature=args.temperature, bank=bank,
            queries=queries, knn=table), indent=1))
        say(f"written to {result}")


if __name__ == "__main__":
    cli.run(knn, parse_args, DataError, CheckpointError)
