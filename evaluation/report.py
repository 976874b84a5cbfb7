"""Tests of classifiers: accuracies and confusions of images, mIoU of pixels, logged and written; predictions as CSV."""

import csv
import io
import shlex
from collections import Counter

import numpy as np
import torch

from common import distributed
from common.distributed import get_rank, get_world_size, is_rank_zero
from common.files import write_text
from common.logger import log, progress_bar
from common.precision import autocast
from data.datasets import DataError, name_image
from data.loaders import normalize, resize_to_patches
from data.segmentation import build_loader
from evaluation.segmentation import count_confusions, predict_pixels, summarize_confusions

# ---- images ----

def measure_top1(network, images, setup):
    """Top-1 accuracy in percent of each classifier, from center crops."""
    predictions, labels = setup.extract(lambda x: network(x).argmax(dim=-1).T, images)
    return (100 * (predictions == labels.view(-1, 1)).double().mean(dim=0)).tolist()


def evaluate_classifier(network, setup, hparams):
    """Log and write the accuracy of a classifier on the test images."""
    report_accuracy(*setup.extract(lambda x: network(x)[0], setup.data.val), setup, hparams)


def report_accuracy(logits, labels, setup, hparams):
    """Log and write top-1, top-5, per-class accuracy and confusions of logits [Q, K] with labels [Q]."""
    classes, predicted = setup.classes, logits.topk(min(5, logits.shape[1]), dim=1).indices
    correct = predicted == labels.view(-1, 1)
    top1, top5 = (100 * x.double().mean().item() for x in (correct[:, 0], correct.any(dim=1)))
    per_class = {classes[c]: 100 * correct[labels == c, 0].double().mean().item() for c in labels.unique().tolist()}
    lowest = sorted(per_class.items(), key=lambda item: item[1])[:5]
    pairs = zip(labels[~correct[:, 0]].tolist(), predicted[~correct[:, 0], 0].tolist())
    confusions = Counter((classes[label], classes[other]) for label, other in pairs).most_common(50)
    log(f"{len(labels)} test images: top-1 {top1:.2f}, top-5 {top5:.2f}")
    log("lowest per-class accuracy: " + ", ".join(f"{name} {accuracy:.1f}%" for name, accuracy in lowest))
    log("most frequent confusions: " + ", ".join(f"{a} as {b} ({count})" for (a, b), count in confusions[:5]))
    result = hparams | dict(top1=top1, top5=top5, num_images=len(labels), per_class=per_class,
                            confusions=[[*pair, count] for pair, count in confusions])
    if setup.args.save_predictions:
        result |= list_predictions(setup, labels, predicted[:, 0])
    setup.write_result(setup.output / "result.json", result)
    log(f"classify images: python evaluate.py predict --ckpt {shlex.quote(str(setup.output))} PATH")


def list_predictions(setup, labels, predicted):
    """{"classes": names, "predictions": one row per image, "confusion_matrix": [true][predicted]}, for JSON."""
    classes, count = setup.classes, len(setup.classes)
    rows = [{"file": name_image(setup.data.val, i), "class": classes[label], "predicted": classes[other]}
            for i, label, other in zip(setup.images.tolist(), labels.tolist(), predicted.tolist())]
    matrix = torch.bincount(labels * count + predicted, minlength=count**2).view(count, count)
    return dict(classes=classes, predictions=rows, confusion_matrix=matrix.tolist())


def write_predictions(path, names, top, classes, num_corrupt):
    """Write the predicted classes of images as CSV: file, class, probability, class_2, ...

    Args:
        top: [M, 2 * k], the k highest probabilities of each image, then the indices of their classes.
    """
    k = top.shape[1] // 2
    rows = [["file", *(name + f"_{i}" * (i > 1) for i in range(1, k + 1) for name in ("class", "probability"))]]
    for name, values in zip(names, top.tolist()):
        rows.append([name])
        for probability, label in zip(values[:k], values[k:]):
            rows[-1] += [classes[int(label)], f"{probability:.6f}"]
    counts = ", ".join(f"{name} {count}" for name, count in Counter(row[1] for row in rows[1:]).most_common(10))
    log(f"{len(top)} image{'s' * (len(top) != 1)}, {num_corrupt} corrupt; most frequent: {counts}")
    if is_rank_zero():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_text(path, text.getvalue())
        log(f"written to {path}")


# ---- pixels ----

def measure_miou(network, images, setup):
    """Mean IoU in percent, as a list of one."""
    return [100 * summarize_confusions(count_test_confusions(network, images, setup)[0])["miou"]]


def report_segmentation(network, setup, hparams):
    """Log and write mIoU, accuracies, those of each class, and the confusion matrix, of all test images."""
    matrix, num_images = count_test_confusions(network, setup.data.val, setup)
    miou, accuracy, mean_accuracy, iou, class_accuracy = summarize_confusions(matrix).values()
    log(f"{num_images} test images: mIoU {100 * miou:.2f}, pixel accuracy {100 * accuracy:.2f}, mean accuracy "
        f"{100 * mean_accuracy:.2f}")
    per_class = {name: dict(iou=100 * a, accuracy=100 * b if b == b else None) for name, a, b in zip(
        setup.classes, iou.tolist(), class_accuracy.tolist()) if a == a}  # NaN: the class does not occur
    lowest = sorted(per_class.items(), key=lambda item: item[1]["iou"])[:5]
    log("lowest IoU: " + ", ".join(f"{name} {values['iou']:.1f}%" for name, values in lowest))
    setup.write_result(setup.output / "result.json", hparams | dict(
        miou=100 * miou, accuracy=100 * accuracy, mean_accuracy=100 * mean_accuracy, num_images=num_images,
        per_class=per_class, classes=setup.classes, confusion_matrix=matrix.tolist()))


@torch.no_grad()
def count_test_confusions(network, images, setup):
    """Confusion matrix of the pixels of images of a SemanticImages, [K, K], and their number; over all processes."""
    args, count = setup.args, len(setup.classes)
    matrix, corrupt = torch.zeros(count, count, dtype=torch.int64), []
    mine = range(get_rank(), len(images), get_world_size())

    def test():
        for example in progress_bar(build_loader(mine, images.__getitem__, args.num_workers), unit="img"):
            if isinstance(example, str):
                corrupt.append(example)
                continue
            (image, labels), _ = example
            x = resize_to_patches(image, args.image_size, setup.backbone.patch_size)
            x = normalize(x, setup.info["mean"], setup.info["std"])[None].to(setup.device)
            with autocast(setup.device, args.precision):
                logits = network(x)[0]
            labels = torch.from_numpy(np.array(labels)).to(setup.device)
            matrix.add_(count_confusions(predict_pixels(logits, labels.shape)[0], labels, count).cpu())
    distributed.wait_for(test)
    matrix = distributed.all_gather_rows(matrix[None]).sum(dim=0)
    corrupt = sum(distributed.all_gather_objects(corrupt), [])
    setup.log_corrupt(corrupt)
    if len(corrupt) == len(images):
        raise DataError(f"{setup.data.path}: no test image can be read, the last: {corrupt[-1]}")
    if not matrix.any():
        raise DataError(f"{setup.data.path}: the masks of the {len(images) - len(corrupt)} test images are unlabeled, "
                        f"nothing to test")
    return matrix, len(images) - len(corrupt)
