"""Parity of an exported ONNX file with its model: ONNX Runtime against torch, at several batch and image sizes.

    report = verify(backbone, model, metadata, images)                   # lines; ExportError if they differ
    x, feed = next(build_inputs(backbone, batch, height, width, metadata))
"""

import contextlib
import itertools
from collections import Counter

import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torchvision.transforms import functional as TF

import infer
from backbones import HeadlessClassifier
from data.shapes import Shapes

# precision -> largest difference, absolute in fp32 and relative to the largest value in half, and least cosine
LIMITS = {"fp32": (1e-4, 0.99999), "fp16": (0.02, 0.9999), "mixed": (0.02, 0.9999)}
LIMITS["int8"] = LIMITS["fp32"]  # before quantization, which has limits of its own


class ExportError(RuntimeError):
    """The exported file does not compute what the model computes."""


def verify(backbone, model, metadata, images=(), classifier=None):
    """Compare a file in ONNX Runtime on the CPU with the model in torch, at several batch sizes and image sizes.

    Args:
        model: the file as bytes.
        images: images to compare on, besides noise and the built-in shapes.
        classifier: Classifiers, if the file has logits.

    Returns:
        the report, lines on nodes, inputs, outputs and the largest differences.

    Raises:
        ExportError: the file is invalid, or an output differs by more than LIMITS.
    """
    opset, precision, names = metadata["opset"], metadata["precision"], list(metadata["outputs"])
    failure = f"ONNX Runtime {onnxruntime.__version__} cannot run this file of opset {opset}"
    with wrap_errors(failure):
        onnx.checker.check_model(model, full_check=True)
        proto = onnx.load_from_string(model)
        session, _ = infer.open_model(model)
    opsets = {item.domain: item.version for item in proto.opset_import}
    if opsets != {"": opset}:
        raise ExportError(f"written in opset {opsets}, not {opset}")
    counts = Counter(node.op_type for node in proto.graph.node).most_common()
    half = open_half_session(proto) if precision in ("fp16", "mixed") else None
    p, (rows, cols) = backbone.patch_size, backbone.grid
    sizes = [metadata["image_size"]] if metadata["image_size"] else [
        (p * h, p * w) for h, w in ((rows, cols), (rows // 2 + 1, cols), (rows + 3, cols + 1))]
    batch_sizes = [metadata["batch_size"]] if metadata["batch_size"] else (1, 2, 7)
    worst = dict.fromkeys(names, (0.0, 1.0))
    for batch, (height, width) in itertools.product(batch_sizes, sizes):
        for x, feed in build_inputs(backbone, batch, height, width, metadata, images):
            with wrap_errors(failure):
                outputs = session.run(names, {"image": feed})
            if half:
                check_half_range(half, feed)
            expected = compute_expected(backbone, x, metadata, classifier)
            for name, output in zip(names, outputs):
                output, target = torch.from_numpy(output).float(), expected[name]
                difference = (output - target).abs().max().item()
                cosine = F.cosine_similarity(output.flatten(1), target.flatten(1)).min().item()
                most, least = LIMITS[precision]
                scale = target.abs().max().item() if half else 1
                if name == "logits":  # the weights multiply what features differ by, and may cancel the rest
                    scale, least = max(scale, 0.1 * classifier.heads[0].weight.norm(dim=1).max().item()), -1
                most *= scale
                if not (difference <= most and cosine >= least):
                    raise ExportError(f"{name} differs from torch by {difference:.2g}, cosine {cosine:.6f}, at {batch} "
                                      f"x {height} x {width}; {precision} allows {most:.2g}, {least:g}")
                worst[name] = max(worst[name][0], difference), min(worst[name][1], cosine)
    return [f"opset {opset}, {precision}, CPUExecutionProvider; {len(proto.graph.node)} nodes: "
            + ", ".join(f"{count} {kind}" for kind, count in counts),
            *(f"{value.name} {value.type[7:-1]} {value.shape}" for value in session.get_inputs()),
            *("{} {} {}, at most {:.1e} from torch, cosine at least {:.6f}".format(
                value.name, value.type[7:-1], value.shape, *worst[value.name]) for value in session.get_outputs())]


@contextlib.contextmanager
def wrap_errors(message):
    """Turn the many exception types of ONNX, its runtime and torch's exporter into ExportError."""
    try:
        yield
    except (ExportError, OSError):  # the latter: images that cannot be read
        raise
    except Exception as error:
        raise ExportError(f"{message}: {error}") from None


def open_half_session(proto):
    """A session of a half-precision model with every sum and product as an output too.

    ONNX Runtime's CPU provider computes most of such a file in float32, which would hide an overflow.
    """
    names = [node.output[0] for node in proto.graph.node if node.op_type in ("Add", "MatMul")
             and not node.output[0].startswith(("image.", "grid.", "logits"))]  # these are in float32, or outputs
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, None)
                              for name in names)
    return infer.open_model(proto.SerializeToString())[0]


def check_half_range(session, feed):
    """Raise ExportError if an output of open_half_session is not finite."""
    for output, value in zip(session.get_outputs(), session.run(None, {"image": feed})):
        if not torch.from_numpy(value).isfinite().all():
            raise ExportError(f"{output.name} leaves the range of half precision: export --precision fp32")


def build_inputs(backbone, batch, height, width, metadata, images=()):
    """Yield (normalized [B, C, H, W] for torch, the same input for the file): noise, shapes, each of the images."""
    mean, std = (torch.tensor(metadata[name] or [0.5]).view(1, -1, 1, 1) for name in ("mean", "std"))
    crop = metadata | {"image_size": [height, width]}
    shape = batch, backbone.in_chans, height, width
    batches = [torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()]
    if metadata.get("channels"):
        batches += [255 * torch.from_numpy(infer.prepare(image.numpy(), crop)).expand(shape) for image in images]
    elif backbone.in_chans == 3:
        shapes = Shapes("test", batch, max(height, width, 16))
        batches += [torch.stack([TF.pil_to_tensor(infer.prepare(image, crop)) for image in group])
                    for group in ([shapes[i][0] for i in range(batch)], *([image] * batch for image in images))]
    for pixels in batches:
        x = (pixels / 255 - mean) / std
        feed = pixels if metadata["input"] == "uint8 RGB" else x.half() if metadata["precision"] == "fp16" else x
        yield x, (feed.permute(0, 2, 3, 1) if metadata["layout"] == "nhwc" else feed).contiguous().numpy()


@torch.no_grad()
def compute_expected(backbone, x, metadata, classifier=None):
    """Outputs of the model in torch, {name: tensor}."""
    logits = {"logits": classifier(x)[0]} if classifier else {}
    if isinstance(backbone, HeadlessClassifier):
        return {"features": backbone(x)} | logits
    features, attention = backbone.forward_with_attention(x)
    attention = attention.unflatten(2, [side // backbone.patch_size for side in x.shape[2:]])
    layers = backbone.get_intermediate_layers(x, max(1, metadata["last_layers"]))
    return {"features": features, "attention": attention.mean(dim=1) if metadata["heads"] == "mean" else attention,
            "patch_tokens": layers[-1][:, 1:]} | {f"layer_{i}": layer for i, layer in enumerate(layers, 1)} | logits
