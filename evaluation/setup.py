"""What the tasks of evaluate.py begin with: backbone, images, their features; and results as JSON.

    setup = EvalSetup(args)                                       # backbone and labeled images
    features = setup.load_or_extract_features(setup.backbone)     # {"train_features": [M, D], ...}
    setup.write_result(path, dict(top1=...))
    images = open_inputs(args, info)                              # the images of a command line, without labels
"""

import os
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset

from common import distributed
from common.distributed import is_rank_zero
from common.files import create_folder, write_json
from common.logger import log
from common.paths import output_folder
from common.precision import autocast
from common.weights import open_backbone, resolve_image_size, save_model
from data import datasets
from data.datasets import DataError
from data.folders import ImageFiles
from data.loaders import build_eval_loader, build_view, default_attention_size
from data.semantic import open_semantic
from data.shards import find_shards
from evaluation.features import extract_features, load_features


class EvalSetup:
    """Backbone, labeled images and output of an evaluation.

    Attributes:
        backbone, info: see `load_backbone`.
        origin: {name: plain value} that the features depend on, written to every output file.
        data, name: see data.datasets.Data and data_name.
        output: Path of the folder of a classifier.
        classes: unique names, None for k-NN without --save_predictions and for few-shot.
        images: indices of the images that `extract` read last.
        corrupt: set of messages on corrupt images.
        fit_device: for fits in float64.
    """

    def __init__(self, args):
        self.args, self.corrupt = args, set()
        self.device = distributed.init_distributed(args.device)[2]
        self.fit_device = torch.device("cpu") if self.device.type == "mps" else self.device  # MPS has no float64
        is_dense = args.task == "segmentation"
        self.backbone, self.info, self.origin = open_backbone(
            args, self.device, needs="patch tokens" * is_dense, precision=args.precision, rgb_only=is_dense)
        if is_dense:
            trained_size, p = self.backbone.grid[0] * self.backbone.patch_size, self.backbone.patch_size
            args.image_size = args.image_size or default_attention_size(trained_size, p)
        args.image_size = resolve_image_size(args.image_size, self.backbone)
        val_path = datasets.trained_val_path(args, self.info)
        if is_dense:
            self.data = open_semantic(args.data_path, self.origin["value_range"])
        else:
            self.data = distributed.run_on_rank_zero_first(self.open_labeled)
        sizes = [len(self.data.train_labeled), len(self.data.val)]
        distributed.check_same_on_all_ranks("numbers of labeled images", sizes)
        log(self.data.note)
        self.origin |= dict(data_path=self.data.path, dataset_sizes=sizes, image_size=args.image_size)
        if not is_dense:  # of a model without one, that of the data
            self.origin["value_range"] = list(getattr(self.data.train, "value_range", None) or ()) or None
        if val_path:
            self.origin["val_path"] = datasets.make_absolute(val_path)
        self.name = datasets.data_name(self.data.path)
        self.output = output_folder(self.origin, args, f"{args.task}{'_quick' * args.quick}.{self.name}")
        self.classes = self.images = None
        # on rank 0: datasets without class names are decoded
        if args.task not in ("knn", "fewshot") or args.save_predictions:
            self.classes = distributed.all_gather_objects(list_class_names(self.data) if is_rank_zero() else None)[0]

    def open_labeled(self):
        """Data of the labeled images that the flags name, or that the newest run was trained on."""
        data = datasets.open_data_of_model(self.args, self.info, self.origin["ckpt"], "the labeled images")
        if data.val is None:
            paths = self.args.data_path or datasets.trained_data_path(self.args, self.info)
            raise DataError(f"{datasets.describe_paths(paths)}: no labels; expected one folder per class, best in "
                            f"train/ and val/")
        return data

    def extract(self, model, images):
        """model(center crop) of each image, over all processes: [M, ...] float32 and labels [M]."""
        with autocast(self.device, self.args.precision):
            outputs, labels, self.images, corrupt = extract_features(
                model, images, self.args.image_size, self.args, self.device, build_view(self.info))
        self.log_corrupt(corrupt)
        return outputs, labels

    def load_or_extract_features(self, model):
        """Features and labels of train and test images: {name: tensor} as for `knn_classifier`."""
        path, parts = self.args.features, dict(train=self.data.train_labeled, test=self.data.val)
        cached = bool(path and Path(path).exists())
        distributed.check_same_on_all_ranks("a features file:", cached)
        origin = self.origin | {f"{part}_files": datasets.hash_images(images).get("sha256")
                                for part, images in parts.items() if path}  # an image may be of another class now
        if cached:
            log(f"features loaded from {path}")
            return load_features(path, origin)
        if path:
            create_folder(Path(path).parent)
        features = {}
        for part, images in parts.items():
            features[f"{part}_features"], features[f"{part}_labels"] = self.extract(model, images)
        if path and is_rank_zero():
            save_model(path, features, {"backbone": self.info["backbone"]} | origin)
            log(f"features written to {path}")
        return features

    def log_corrupt(self, messages):
        """Log messages on corrupt images, each once."""
        for message in sorted(set(messages) - self.corrupt):
            log(f"skipped corrupt image {message}")
        self.corrupt.update(messages)

    def write_result(self, path, result):
        """Write a result as JSON, with its origin and the corrupt images."""
        if is_rank_zero():
            write_json(path, self.origin | result | {"corrupt": sorted(self.corrupt)})
            log(f"written to {path}")


def list_class_names(data):
    """Unique class names: the data set's, with the index where two are equal; indices where it has none (SVHN)."""
    names = getattr(data.train, "classes", None)
    if not names:
        loader = build_eval_loader(ConcatDataset([data.train_labeled, data.val]), size=32, batch_size=256)
        names = range(1 + max(label for _, labels, _, _ in loader for label in labels.tolist()))
    names = [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]


def open_inputs(args, info):
    """The images, folders, shards and named sets of a command line, for a model of this description, as one dataset."""
    parts, options = [], dict(value_range=info.get("value_range"), channels=info["channels"])
    for paths in datasets.group_shards(args.images):
        path, is_source = paths[0], datasets.is_source(paths[0])
        check_output(args.output, (file for path in paths for file in (find_shards(path) if is_source else [path])))
        if os.path.isdir(path) or is_source:
            parts.append(distributed.run_on_rank_zero_first(
                lambda paths=paths: datasets.open_images(paths, cache_dir=args.cache_dir, **options)))
            if info["channels"] and not is_source:  # .npy files are images
                check_output(args.output, map(parts[-1].name, range(len(parts[-1]))))
            log(f"{(count := len(parts[-1])):,} image{'s' * (count != 1)} in {datasets.describe_paths(paths)}"
                f"{parts[-1].passed_over}")
        elif os.path.exists(path):
            parts.append(ImageFiles(paths, **options))
        elif ":" in path or path == "shapes":
            data = distributed.run_on_rank_zero_first(lambda path=path: datasets.open_data(path, **options))
            parts.append(data.train)
            log(data.note)
        else:
            raise DataError(f"{path}: no such image or folder")
    return datasets.ConcatImages(parts, [None] * len(parts), [])


def check_output(output, inputs):
    """Raise DataError if an output file is one of the inputs, under whatever name."""
    if os.path.exists(output) and any(os.path.exists(path) and os.path.samefile(path, output) for path in inputs):
        raise DataError(f"--output {output}: is one of the inputs, choose another")
