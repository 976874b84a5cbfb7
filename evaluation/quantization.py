"""INT8 quantization of an exported ONNX file by ONNX Runtime, calibrated and compared with torch on images.

    model, lines = quantize(backbone, model, metadata, data)      # static or, if that is too inaccurate, dynamic
    line = check_accuracy(backbone, model, metadata, data)

Products with weights are computed in integers: q, k, v, the projection and the MLP of each block. The patch embedding,
attention products, softmax, GELU, norms and a classifier stay in fp32. Weights have a scale per output channel and 7
bits, because x86 processors without VNNI saturate on products of 8 bits, and a file that is accurate on one processor
should be so on another. Activations are uint8 with one scale per tensor: measured on images beforehand (static), or on
each batch while it runs (dynamic). Products are returned in fp32, not rounded to 8 bits again.
"""

import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

from data.loaders import build_eval_loader, build_view, random_subset
from evaluation.features import extract_features
from evaluation.knn import knn_classifier
from evaluation.onnx_parity import ExportError, compute_expected, wrap_errors
from evaluation.onnx_speed import open_session, time_files

CALIBRATION_IMAGES, COMPARED_IMAGES = 256, 1000  # the latter: train and held-out images, each
MIN_COSINE, MAX_DROP = 0.99, 0.5  # of the features of each image; k-NN accuracy in points
MIN_AGREEMENT = 98  # percent of images whose class by logits is that of the model
MAX_ATTENTION = 2**26  # values of an attention matrix, of a batch


def quantize(backbone, model, metadata, data, batch_size=1, classifier=None):
    """Quantize an fp32 file: static, or dynamic if static is too inaccurate.

    Args:
        backbone: VisionTransformer that the file was built from.
        model: the file as bytes.
        metadata: of the file.
        data: see `open_data`; labels are not needed.
        batch_size: that speed is measured at.
        classifier: Classifiers, if the file has logits.

    Returns:
        the quantized file as bytes, and lines on accuracy and speed.

    Raises:
        ExportError: both are too inaccurate, or ONNX Runtime cannot quantize the file.
    """
    failures, (calibration, *_) = [], split_images(data)
    for method in ("static", "dynamic"):
        batches = iter_inputs(calibration, backbone, metadata) if method == "static" else None
        with wrap_errors("ONNX Runtime cannot quantize this file"):
            quantized = quantize_products(model, batches)
        try:
            report = check_accuracy(backbone, quantized, metadata, data, classifier)
        except ExportError as error:
            failures.append(f"{method}: {error}")
        else:
            image = next(iter_inputs(calibration, backbone, metadata))["image"]
            feed = np.resize(image, (metadata["batch_size"] or batch_size, *image.shape[1:]))
            return quantized, [f"int8, {method}: {report[0]}", *report[1:],
                               time_files(quantized, model, feed),
                               f"{len(quantized) / 1e6:.1f} MB, fp32 {len(model) / 1e6:.1f} MB"]
    raise ExportError(f"int8 is refused, {'; '.join(failures)}; export --precision fp32")


def split_images(data):
    """Images to calibrate on and to compare on: training images, and a list of these and the held-out ones.

    Without labels, each half of the training images. No held-out image is calibrated on.

    Raises:
        ExportError: one image without a label.
    """
    if data.val is not None:
        return data.train_labeled, [data.train_labeled, data.val]
    if len(data.train) < 2:
        raise ExportError("int8 is calibrated on one half of the images and compared on the other: 1 is too few")
    return Subset(data.train, range(0, len(data.train), 2)), [Subset(data.train, range(1, len(data.train), 2))]


def quantize_products(model, batches=None):
    """Quantize the products with weights of a file, given and returned as bytes.

    Args:
        batches: inputs of the file to calibrate on; None for dynamic quantization.
    """
    # imported here: it takes a second
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    class CalibrationImages(CalibrationDataReader):
        def get_next(self):
            return next(batches, None)

    proto = onnx.load_from_string(model)
    properties = {item.key: item.value for item in proto.metadata_props}
    add_pre_process_metadata(proto)  # without it ONNX Runtime warns, but there is nothing to simplify in these graphs
    constants = {constant.name for constant in proto.graph.initializer}
    nodes = [node.name for node in proto.graph.node if node.op_type == "MatMul" and node.input[1] in constants
             and not node.name.startswith("logits")]
    options = dict(op_types_to_quantize=["MatMul"], nodes_to_quantize=nodes, per_channel=True, reduce_range=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        if batches is None:
            quantize_dynamic(proto, path, **options)
        else:
            quantize_static(proto, path, CalibrationImages(), activation_type=QuantType.QUInt8, **options,
                            extra_options=dict(OpTypesToExcludeOutputQuantization=["MatMul"]))
        proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, properties)
    return proto.SerializeToString()


# ---- accuracy ----

@torch.no_grad()
def check_accuracy(backbone, model, metadata, data, classifier=None):
    """Compare the outputs of a quantized file with those of its model on images: lines with the figures.

    Raises:
        ExportError: the cosine of the features of an image is below MIN_COSINE, k-NN accuracy on held-out images is
            more than MAX_DROP points lower (of less than 200 held-out images, one may be lost), or the logits of less
            than MIN_AGREEMENT percent of the images have their largest value at the same class.
    """
    names, session = list(metadata["outputs"]), open_session(model)
    cosines, agree = {name: [] for name in names}, []

    def extract_both(views):
        with wrap_errors("ONNX Runtime cannot run this file"):
            outputs = session.run(names, {"image": to_input(views, metadata)})
        outputs = {name: torch.from_numpy(output[:len(views)]).float() for name, output in zip(names, outputs)}
        expected = compute_expected(backbone, views, metadata, classifier)
        for name in names:
            cosines[name].append(F.cosine_similarity(outputs[name].flatten(1), expected[name].flatten(1)))
        if classifier:
            agree.append(outputs["logits"].argmax(dim=1) == expected["logits"].argmax(dim=1))
        return torch.cat((expected["features"], outputs["features"]), dim=1)

    args = Namespace(batch_size_per_gpu=calibration_batch_size(backbone, metadata), num_workers=0)
    both, labels, corrupt = [], [], []
    for images in split_images(data)[1]:
        x, y, _, messages = extract_features(extract_both, random_subset(images, COMPARED_IMAGES), crop_size(metadata),
                                             args, view=build_view(metadata))
        both.append(x.chunk(2, dim=1))
        labels.append(y)
        corrupt += messages
    num_compared = len(labels[-1])
    cosines = {name: torch.cat(parts)[-num_compared:] for name, parts in cosines.items()}
    features = cosines.pop("features")
    line = f"cosine at least {features.min():.4f}, mean {features.mean():.4f} on {num_compared:,} images"
    is_accurate, allowed = features.min() >= MIN_COSINE, f"{MIN_COSINE:g}"  # False for NaN
    if len(both) == 2:
        exact, quantized = ([*knn_classifier(train, labels[0], val, labels[1], ks=(20,)).values()][0][0]
                            for train, val in zip(*both))
        max_drop = max(MAX_DROP, 100 / num_compared)
        line += f"; k-NN {quantized:.1f}%, fp32 {exact:.1f}%"
        is_accurate &= exact - quantized <= max_drop + 1e-3
        allowed += f" and {max_drop:.1f} points"
    if classifier:
        agreement = 100 * torch.cat(agree)[-num_compared:].float().mean().item()
        line += f"; class of logits as in fp32 on {agreement:.1f}%"
        is_accurate &= agreement >= MIN_AGREEMENT
        allowed += f" and {MIN_AGREEMENT}%"
    if not is_accurate:
        raise ExportError(f"{line} (allowed {allowed})")
    report = [line]
    if len(both) == 1:
        report.append("no labels, so k-NN was not compared")
    if cosines:
        report.append("least cosine of " + ", ".join(f"{name} {values.min():.4f}" for name, values in cosines.items()))
    if corrupt:
        report.append(f"skipped {len(corrupt)} corrupt images, the first: {corrupt[0]}")
    return report


# ---- input ----

def iter_inputs(images, backbone, metadata):
    """Yield batches of CALIBRATION_IMAGES images as the file takes them, {"image": array}."""
    loader = build_eval_loader(random_subset(images, CALIBRATION_IMAGES), crop_size(metadata),
                               calibration_batch_size(backbone, metadata), view=build_view(metadata))
    return ({"image": to_input(views, metadata)} for views, *_ in loader if len(views))


def calibration_batch_size(backbone, metadata):
    """Batch size of calibration and comparison: that of the file, or 64, less where attention matrices are large."""
    num_tokens = 1 + np.prod([side // backbone.patch_size for side in crop_size(metadata)])
    return metadata["batch_size"] or max(1, min(64, int(MAX_ATTENTION // (backbone.num_heads * num_tokens**2))))


def crop_size(metadata):
    return metadata["image_size"] or [metadata["trained_size"]] * 2


def to_input(views, metadata):
    """Normalized views [B, C, H, W] as the file takes them, repeated to its batch size where that is fixed."""
    if metadata["input"] == "uint8 RGB":
        mean, std = (torch.tensor(metadata[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
        views = (255 * (views * std + mean)).round().clamp(0, 255).byte()
        views = views.permute(0, 2, 3, 1) if metadata["layout"] == "nhwc" else views
    x = views.numpy()
    return np.resize(x, (metadata["batch_size"] or len(x), *x.shape[1:]))
