import collections

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torchvision.transforms import functional as TF

from onnx_graph import build_graph
from vit import SIZES, VisionTransformer

# Operators of TensorRT 10's parser without restrictions that matter here: github.com/onnx/onnx-tensorrt, operators.md.
# Resize is supported in linear and nearest mode only, so --dynamic size is not for TensorRT.
TENSORRT = set("Add Cast Concat Conv Div Erf Expand Gelu LayerNormalization MatMul Mul ReduceMean Reshape Shape Slice "
               "Softmax Transpose".split())


def random_model(**sizes):
    """A model with weights so far from their initial values that attention is not uniform and every path matters."""
    torch.manual_seed(0)
    model = VisionTransformer(**sizes).eval()
    for name, p in model.named_parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.2)
        elif "qkv" in name:
            torch.nn.init.normal_(p, std=2 / p.shape[1] ** 0.5)
    return model


@pytest.fixture(scope="module")
def model():
    return random_model(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=2)


def run(graph, image):
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.get_providers() == ["CPUExecutionProvider"]
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": image})))


@torch.no_grad()
def expected(model, x, last_layers=1):
    features, attention = model.forward_with_attention(x)
    layers = model.get_intermediate_layers(x, last_layers)
    grid = [side // model.patch_size for side in x.shape[2:]]
    return {"features": features, "attention": attention.unflatten(2, grid),
            "patch_tokens": layers[-1][:, 1:]} | {f"layer_{i + 1}": layer for i, layer in enumerate(layers)}


def assert_equal(outputs, wanted, precision="fp32"):
    for name, output in outputs.items():
        output = torch.from_numpy(output.astype(np.float32))
        assert output.shape == wanted[name].shape
        if precision == "fp32":
            assert (output - wanted[name]).abs().max() < 1e-4, name
        assert torch.cosine_similarity(output.flatten(1), wanted[name].flatten(1)).min() > 0.9995, name


@pytest.mark.parametrize("precision", ["fp32", "fp16", "mixed"])
@pytest.mark.parametrize("opset", range(18, min(25, onnx.defs.onnx_opset_version() + 1)))
def test_every_opset_and_precision(model, opset, precision):
    graph = build_graph(model, 40, 64, precision=precision, opset=opset, patch_tokens=True, last_layers=2)
    onnx.checker.check_model(graph, full_check=True)
    assert [(item.domain, item.version) for item in graph.opset_import] == [("", opset)]
    image = torch.randn(3, 3, 40, 64, generator=torch.Generator().manual_seed(1))
    outputs = run(graph, image.numpy().astype(np.float16 if precision == "fp16" else np.float32))
    assert set(outputs) == {"features", "attention", "patch_tokens", "layer_1", "layer_2"}
    assert_equal(outputs, expected(model, image, 2), precision)


@pytest.mark.parametrize("opset", [18, 19, 20, 23])
@pytest.mark.parametrize("kwargs", [{}, {"heads": "mean"}, {"batch": 2}, {"pixels": "nhwc", "precision": "mixed"}])
def test_graph_has_no_superfluous_nodes(model, opset, kwargs):
    """One node per norm, none to split q, k and v, only operators of TensorRT, all shapes inferred."""
    kwargs |= {"mean": (0.5,) * 3, "std": (0.25,) * 3} if "pixels" in kwargs else {}
    graph = build_graph(model, 32, 32, opset=opset, **kwargs)
    counts = collections.Counter(node.op_type for node in graph.graph.node)
    assert counts["LayerNormalization"] == 7 and counts["Softmax"] + counts["Attention"] == 3
    assert counts["Slice"] == 3 and counts["Conv"] == 1  # CLS before and behind a norm, patches of the attention row
    assert set(counts) - {"Attention"} <= TENSORRT and counts["Attention"] == (2 if opset >= 23 else 0)
    assert (counts["Gelu"], counts["Erf"]) == ((3, 0) if opset >= 20 else (0, 3))
    assert (counts["Shape"], counts["Expand"]) == ((0, 0) if "batch" in kwargs else (1, 1))
    used = {name for node in graph.graph.node for name in node.input}
    made = {name for node in graph.graph.node for name in node.output}
    assert {constant.name for constant in graph.graph.initializer} <= used
    assert made - used == {output.name for output in graph.graph.output}
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*inferred.value_info, *inferred.output)}
    for name in made - {"batch", "cls_token.shape"}:  # which hold shapes themselves
        sides = [side.dim_value or side.dim_param for side in shapes[name]]
        unknown = [side for side in sides if not isinstance(side, int) and side != "batch"]
        assert not unknown or (name, len(unknown)) == ("cls_tokens", 1), (name, sides)


@pytest.mark.parametrize("precision, products, norms", [("fp32", 1, 1), ("fp16", 10, 10), ("mixed", 10, 1)])
def test_types_of_strongly_typed_files(model, precision, products, norms):
    """1 is float32, 10 float16; TensorRT's --stronglyTyped computes in these."""
    graph = onnx.shape_inference.infer_shapes(build_graph(model, 32, 32, precision=precision), strict_mode=True).graph
    types = {constant.name: constant.data_type for constant in graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type
              for value in (*graph.input, *graph.value_info, *graph.output)}
    for node in graph.node:
        if node.op_type in ("MatMul", "Conv", "Erf", "Add"):
            assert {types[name] for name in (*node.input, *node.output)} == {products}, node.name
        if node.op_type in ("LayerNormalization", "Softmax"):
            assert {types[name] for name in (*node.input, *node.output)} == {norms}, node.name
    assert {types[value.name] for value in (*graph.input, *graph.output)} == {norms}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "mixed"])
@pytest.mark.parametrize("height, width", [(40, 64), (None, None)])
def test_convolutional_stem(precision, height, width):
    """Batch norm is in the weights of the convolutions."""
    model = random_model(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, conv_stem=True)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    graph = build_graph(model, height, width, precision=precision)
    onnx.checker.check_model(graph, full_check=True)
    counts = collections.Counter(node.op_type for node in graph.graph.node)
    assert (counts["Conv"], counts["Relu"], counts["BatchNormalization"]) == (4, 3, 0)
    image = torch.randn(2, 3, height or 48, width or 24)
    outputs = run(graph, image.numpy().astype(np.float16 if precision == "fp16" else np.float32))
    assert_equal(outputs, expected(model, image), precision)


@pytest.mark.parametrize("opset, precision", [(18, "fp32"), (20, "mixed")])
def test_any_size(model, opset, precision):
    """Position embeddings are interpolated in the graph as in torch, and unchanged at the learned size."""
    graph = build_graph(model, opset=opset, precision=precision, patch_tokens=True, heads="mean")
    for height, width in ((32, 32), (40, 64), (96, 24), (32, 40), (8, 8)):
        image = torch.randn(2, 3, height, width)
        wanted = expected(model, image)
        wanted["attention"] = wanted["attention"].mean(dim=1)
        assert_equal(run(graph, image.numpy()), wanted, precision)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "mixed"])
def test_pixels_are_normalized_in_the_graph(model, scene, layout, precision):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = scene.resize((48, 32))
    pixels = np.asarray(image)[None]
    graph = build_graph(model, 32, 48, pixels=layout, mean=mean, std=std, precision=precision)
    outputs = run(graph, pixels if layout == "nhwc" else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    assert_equal(outputs, expected(model, TF.normalize(TF.to_tensor(image), mean, std)[None]), precision)


@pytest.mark.parametrize("arch, patch_size, sizes, batches", [
    ("vit_tiny", 16, [(96, 96), (480, 320)], [2]), ("vit_tiny", 8, [(96, 96)], [2]),
    ("vit_small", 16, [(224, 224)], [1]), ("vit_small", 8, [(96, 96)], [1]),
    pytest.param("vit_base", 16, [(96, 96)], [2], marks=pytest.mark.slow),
    pytest.param("vit_tiny", 16, [(224, 224), (96, 96), (480, 320)], [1, 2, 7], marks=pytest.mark.slow),
    pytest.param("vit_tiny", 8, [(224, 224)], [2], marks=pytest.mark.slow),
    pytest.param("vit_small", 16, [(224, 224)], [7], marks=pytest.mark.slow)])
def test_models_of_the_paper(arch, patch_size, sizes, batches):
    model = random_model(patch_size=patch_size, **SIZES[arch])
    for height, width in sizes:
        graph = build_graph(model, height, width)
        for batch in batches:
            image = torch.randn(batch, 3, height, width)
            assert_equal(run(graph, image.numpy()), expected(model, image))
