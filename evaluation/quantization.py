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

from data.loaders import build_eval_loader, build_view, center_crop_view, random_subset
from evaluation.features import extract_features
from evaluation.knn import knn_classifier
from evaluation.onnx_parity import ExportError
from evaluation.onnx_speed import compare_files, open_session

CALIBRATION_IMAGES, COMPARED_IMAGES = 256, 1000  # the latter: train and held-out images, each
MIN_COSINE, MAX_DROP = 0.99, 0.5  # of the features of each image; k-NN accuracy in points


def quantize(backbone, model, metadata, data, batch_size=1):
    """Quantize an fp32 file: static, or dynamic if static is too inaccurate.

    Args:
        backbone: VisionTransformer that the file was built from.
        model: the file as bytes.
        metadata: of the file.
        data: see `open_data`; labels are not needed.
        batch_size: that speed is measured at.

    Returns:
        the quantized file as bytes, and lines on accuracy and speed.

    Raises:
        ExportError: both are too inaccurate.
    """
    failures = []
    for method in ("static", "dynamic"):
        batches = iter_inputs(data.train, CALIBRATION_IMAGES, metadata) if method == "static" else None
        quantized = quantize_products(model, batches)
        try:
            line = check_accuracy(backbone, quantized, metadata, data)
        except ExportError as error:
            failures.append(f"{method}: {error}")
        else:
            image = next(iter_inputs(data.train, CALIBRATION_IMAGES, metadata))["image"]
            feed = np.resize(image, (metadata["batch_size"] or batch_size, *image.shape[1:]))
            return quantized, [f"int8, {method}: {line}", compare_files(quantized, model, feed),
                               f"{len(quantized) / 1e6:.1f} MB, fp32 {len(model) / 1e6:.1f} MB"]
    raise ExportError(f"int8 is refused, {'; '.join(failures)}; export --precision fp32")


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
def check_accuracy(backbone, model, metadata, data):
    """Compare the features of a quantized file with those of its model on images: a line with the figures.

    Without labels there is the cosine alone, on training images.

    Raises:
        ExportError: the cosine of an image is below MIN_COSINE, or k-NN accuracy on held-out images is more than
            MAX_DROP points lower; of less than 200 held-out images, one may be lost.
    """
    session = open_session(model)

    def extract_both(views):
        features, = session.run(["features"], {"image": to_input(views, metadata)})
        return torch.cat((backbone(views), torch.from_numpy(features[:len(views)])), dim=1)

    args = Namespace(batch_size_per_gpu=metadata["batch_size"] or 64, num_workers=0)
    has_labels = data.val is not None
    both, labels = [], []
    for images in (data.train_labeled, data.val) if has_labels else (data.train,):
        x, y, *_ = extract_features(extract_both, random_subset(images, COMPARED_IMAGES), crop_size(metadata), args,
                                    view=build_view(metadata, crop_center))
        both.append(x.chunk(2, dim=1))
        labels.append(y)
    cosines = F.cosine_similarity(*both[-1])
    line = f"cosine at least {cosines.min():.4f}, mean {cosines.mean():.4f} on {len(cosines):,} images"
    is_accurate = cosines.min() >= MIN_COSINE  # False for NaN
    if has_labels:
        exact, quantized = ([*knn_classifier(train, labels[0], val, labels[1], ks=(20,)).values()][0][0]
                            for train, val in zip(*both))
        line += f"; k-NN {quantized:.1f}%, fp32 {exact:.1f}%"
        is_accurate &= exact - quantized <= max(MAX_DROP, 100 / len(cosines)) + 1e-3
    if not is_accurate:
        allowed = f"{MIN_COSINE:g}" + f" and {MAX_DROP:g} points" * has_labels
        raise ExportError(f"{line} (allowed {allowed})")
    return line


# ---- input ----

def iter_inputs(images, max_images, metadata):
    """Yield batches of a dataset as the file takes them, {"image": array}."""
    loader = build_eval_loader(random_subset(images, max_images), crop_size(metadata), metadata["batch_size"] or 64,
                               view=build_view(metadata, crop_center))
    return ({"image": to_input(views, metadata)} for views, *_ in loader if len(views))


def crop_size(metadata):
    return metadata["image_size"] or [metadata["trained_size"]] * 2


def crop_center(image, size, mean, std):
    return center_crop_view(image, *size, mean, std)


def to_input(views, metadata):
    """Normalized views [B, C, H, W] as the file takes them, repeated to its batch size where that is fixed."""
    if metadata["input"] == "uint8 RGB":
        mean, std = (torch.tensor(metadata[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
        views = (255 * (views * std + mean)).round().clamp(0, 255).byte()
        views = views.permute(0, 2, 3, 1) if metadata["layout"] == "nhwc" else views
    x = views.numpy()
    return np.resize(x, (metadata["batch_size"] or len(x), *x.shape[1:]))
