"""Judge the features of a trained backbone.

    python evaluate.py knn                                    # the newest run, on the data it was trained on
    python evaluate.py linear                                 # likewise, by linear classifiers on frozen features
    python evaluate.py knn --ckpt dino_deitsmall16_pretrain.pth --data_path /data/imagenet
    torchrun --nproc_per_node=8 evaluate.py knn --ckpt runs/vits16/teacher.safetensors

`knn` classifies the held-out pictures by a weighted vote of their nearest neighbours among the others, top-1 and
top-5 for several numbers of neighbours. `linear` extracts the features once and trains a grid of linear classifiers on
them; the one that is best on every tenth picture is trained again on all and asked about the held-out ones, once.
Results are also written beside the checkpoint, as NAME.knn.json and NAME.linear.json. With `--features FILE` the
features are kept, and taken from there the next time.
"""

import hashlib
import itertools
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import cli
from batches import eval_loader
from checkpoint import CheckpointError, load_backbone, newest_model
from cli import natural_float, positive, positive_float
from data import DataError, open_data
from knn import extract_features, knn_classifier
from probe import choose, fit, top
from resume import write_whole


def parse_args(argv=None):
    parser = cli.parser("evaluate.py", __doc__)
    parser.add_argument("task", choices=list(TASKS), help="how to judge")
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
    parser.add_argument("--n_last_blocks", type=positive, default=4, metavar="N",
                        help="linear: CLS tokens of so many blocks side by side (default: 4; in the paper 1 for base)")
    parser.add_argument("--avgpool_patchtokens", type=cli.boolean, nargs="?", const=True, default=False, metavar="X",
                        help="linear: the last block's mean patch token beside them, as for vit_base (default: false)")
    parser.add_argument("--lrs", type=positive_float, nargs="+", metavar="LR",
                        default=[0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0], help="linear: learning rates of the grid")
    parser.add_argument("--weight_decays", type=natural_float, nargs="+", metavar="WD",
                        default=[0.0, 1e-4, 1e-3, 1e-2, 1e-1], help="linear: weight decays of the grid")
    parser.add_argument("--epochs", type=positive, default=100, metavar="N", help="linear: (default: 100)")
    parser.add_argument("--features", metavar="FILE", help="safetensors file to keep the features in; if it is there "
                                                           "they are taken from it")
    parser.add_argument("--batch_size_per_gpu", type=positive, default=128, metavar="B", help="(default: 128)")
    cli.add_machine_flags(parser)
    return parser.parse_args(argv)


LABELS = {"bank": "bank_labels", "queries": "query_labels"}  # names in a file of features: of each part, of its labels


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
            features = {name: file.get_tensor(name) for part in LABELS.items() for name in part}
            found = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: no features, or damaged ({error})") from None
    for name, value in origin.items():
        if name != "ckpt" and found.get(name) != value:
            raise CheckpointError(f"{path}: holds features with {name} {found.get(name)}, not {value}: name another "
                                  f"--features, or delete it")
    for part, labels in LABELS.items():
        x, y = features[part], features[labels]
        if x.dim() != 2 or not x.is_floating_point() or y.shape != x.shape[:1] or y.dtype != torch.int64 or not len(x) \
                or not x.isfinite().all() or y.min() < 0:
            raise CheckpointError(f"{path}: its {part} are not features with labels")
    return features


class Tokens(torch.nn.Module):
    """What the paper puts a linear classifier on: the CLS tokens of the last blocks, and the mean patch token."""

    def __init__(self, backbone, n_last_blocks, avgpool):
        super().__init__()
        self.backbone, self.n_last_blocks, self.avgpool = backbone, min(n_last_blocks, len(backbone.blocks)), avgpool

    def forward(self, x):  # [B, C, H, W] -> [B, n * D]
        tokens = self.backbone.get_intermediate_layers(x, self.n_last_blocks)
        patches = [tokens[-1][:, 1:].mean(dim=1)] if self.avgpool else []
        return torch.cat([t[:, 0] for t in tokens] + patches, dim=1)


def extract(args, model_of=lambda backbone: backbone, **more):
    """The features that a task asks for, each picture once over all processes.

    Args:
        model_of: from the backbone to what is to be judged.
        more: what else the features depend on.

    Returns:
        features and labels by name (see LABELS), what they came from, the names of the classes, device and rank.
    """
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

    origin = dict(ckpt=str(ckpt), sha256=sha256(ckpt), data_path=data.path, image_size=size, **more)
    classes = [str(name) for name in getattr(data.train, "classes", None) or []]
    if args.features and os.path.exists(args.features):
        features = load_features(args.features, origin)
        say(f"features taken from {args.features}")
        return features, origin, classes, device, rank
    model, features = model_of(backbone).to(device), {}
    for part, images in (("bank", data.bank), ("queries", data.queries)):
        loader = eval_loader(images, size, args.batch_size_per_gpu, args.num_workers, rank, world_size)
        with tqdm(total=len(loader.dataset), unit="img", disable=rank != 0 or not sys.stderr.isatty()) as bar:
            x, labels, unreadable = extract_features(model, loader, device, bar.update)
        features |= {part: x, LABELS[part]: labels}
        for message in unreadable:
            say(f"skipped unreadable picture {message}")
    if args.features and rank == 0:
        save_features(args.features, features, origin)
        say(f"features written to {args.features}")
    return features, origin, classes, device, rank


def write_result(task, origin, **result):
    path = Path(origin["ckpt"]).with_suffix(f".{task}.json")
    path.write_text(json.dumps(origin | result, indent=1))
    print(f"written to {path}")


def knn(args):
    """A weighted vote of the nearest neighbours."""
    features, origin, _, device, rank = extract(args)
    scores = knn_classifier(*features.values(), args.nb_knn, args.temperature, args.knn_memory_mb, device)
    if rank > 0:
        return
    bank, queries = len(features["bank"]), len(features["queries"])
    print(f"k-NN of {origin['ckpt']}: {queries} pictures among {bank}, {origin['image_size']} pixels, temperature "
          f"{args.temperature}\n     k   top-1   top-5")
    for k, (top1, top5) in scores.items():
        print(f"{k:6d}  {top1:6.2f}  {top5:6.2f}")
    table = {k: dict(top1=top1, top5=top5) for k, (top1, top5) in scores.items()}
    write_result("knn", origin, temperature=args.temperature, bank=bank, queries=queries, knn=table)


def linear(args):
    """A grid of linear classifiers on features that are extracted once."""
    tokens = dict(n_last_blocks=args.n_last_blocks, avgpool=args.avgpool_patchtokens)
    features, origin, classes, device, rank = extract(args, lambda backbone: Tokens(backbone, **tokens), **tokens)
    if rank == 0:  # the others only extract
        judge_linear(args, *(x.to(device) for x in features.values()), origin, classes)
    cli.gather(None)


def judge_linear(args, bank, bank_labels, queries, query_labels, origin, classes):
    grid = list(itertools.product(args.lrs, args.weight_decays))
    num_classes = int(max(bank_labels.max(), query_labels.max())) + 1
    classes = classes or [str(c) for c in range(num_classes)]
    with tqdm(total=2 * args.epochs * len(bank), unit="img", disable=not sys.stderr.isatty()) as bar:
        best, held_out = choose(bank, bank_labels, num_classes, grid, epochs=args.epochs, progress=bar.update)
        classifier = fit(bank, bank_labels, num_classes, [grid[best]], epochs=args.epochs, progress=bar.update)
    lr, weight_decay = grid[best]
    answers = top(classifier, queries)[0]  # [Q, 5]
    hits = answers == query_labels.view(-1, 1)
    top1, top5 = (100 * x.double().mean().item() for x in (hits[:, 0], hits.any(dim=1)))
    print(f"linear probe of {origin['ckpt']}: {len(grid)} classifiers on {bank.shape[1]} features of {len(bank)} "
          f"pictures; best on every tenth: lr {lr:g}, weight decay {weight_decay:g} ({held_out[best]:.2f}%)\n"
          f"{len(queries)} pictures: top-1 {top1:.2f}, top-5 {top5:.2f}")
    per_class = {classes[c]: 100 * hits[query_labels == c, 0].double().mean().item()
                 for c in query_labels.unique().tolist()}
    pairs = Counter((classes[true], classes[said]) for true, said in zip(query_labels.tolist(), answers[:, 0].tolist())
                    if true != said)
    print("weakest classes: " + ", ".join(f"{name} {accuracy:.1f}%"
                                          for name, accuracy in sorted(per_class.items(), key=lambda x: x[1])[:5]))
    print("most often taken for another: " + ", ".join(f"{true} for {said} ({count})"
                                                       for (true, said), count in pairs.most_common(5)))
    write_result("linear", origin, lr=lr, weight_decay=weight_decay, held_out=held_out[best], top1=top1, top5=top5,
                 per_class=per_class, confused=[[*pair, count] for pair, count in pairs.most_common(50)])


TASKS = {"knn": knn, "linear": linear}


def main(args):
    TASKS[args.task](args)


if __name__ == "__main__":
    cli.run(main, parse_args, DataError, CheckpointError)
