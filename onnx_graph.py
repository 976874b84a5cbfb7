"""The backbone as an ONNX graph, node by node: nothing in it that the network does not need.

    model = build_graph(backbone, 224, 224, precision="mixed", opset=18)
    onnx.save(model, "model.onnx")

There is no tracing: the graph is written from the formulas of vit.py. q, k and v have a matrix each, with the scale
of the scores folded into q's; a norm is one LayerNormalization; the position embedding is a constant unless the size
may vary; of the last block, only what is asked for is computed. At a fixed size and opsets 18 to 20 TensorRT's parser
lists every node of it. This file needs torch, numpy and onnx.

Shapes in this file: B images, H x W pixels, N = H/p * W/p patches, D width.
"""

import math

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn.utils.fusion import fuse_conv_bn_weights

TYPES = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}
END = 2**31 - 1  # of a Slice


class Graph:
    """Nodes and constants in the order in which they are added; every method returns the name of its result.

    Args:
        opset: version of ONNX's operators, 18 or above.
        precision: "fp32"; "fp16"; or "mixed": matrix products in fp16, norms, softmax, input and outputs in fp32.
    """

    def __init__(self, opset: int, precision: str):
        self.opset, self.nodes, self.constants = opset, [], {}
        self.dtype = np.float32 if precision == "fp32" else np.float16
        self.norm_dtype = np.float16 if precision == "fp16" else np.float32  # of softmax, input and outputs too

    def node(self, op, name, *inputs, **attributes):
        """A node; inputs are names of results or, for shapes, axes and the like, tuples of integers."""
        inputs = [self.constant(f"{name}.{i}", x, np.int64) if isinstance(x, tuple) else x
                  for i, x in enumerate(inputs)]
        self.nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def constant(self, name, values, dtype=None):
        values = torch.as_tensor(values).detach().cpu().numpy().astype(dtype or self.dtype)
        self.constants[name] = numpy_helper.from_array(values, name)
        return name

    def cast(self, name, x, dtype, from_dtype):
        return x if dtype == from_dtype else self.node("Cast", name, x, to=TYPES[dtype])

    def linear(self, name, x, weight, bias, dtype=None):
        """x [..., in] times weight [out, in] plus bias [out]."""
        product = self.node("MatMul", f"{name}.product", x, self.constant(f"{name}.weight", weight.T, dtype))
        return self.node("Add", name, product, self.constant(f"{name}.bias", bias, dtype))

    def conv(self, name, x, layer, weights):
        """Convolution of x [B, C, H, W], of the sizes of an nn.Conv2d, with a weight and a bias."""
        weights = (self.constant(f"{name}.{part}", p) for part, p in zip(("weight", "bias"), weights))
        return self.node("Conv", name, x, *weights, kernel_shape=layer.kernel_size, strides=layer.stride,
                         pads=2 * layer.padding)

    def norm(self, name, x, layer, dtype):
        """LayerNorm over the last axis, computed in norm_dtype; its output in dtype."""
        x = self.cast(f"{name}.input", x, self.norm_dtype, self.dtype)
        weight, bias = (self.constant(f"{name}.{part}", p, self.norm_dtype) for part, p in layer.named_parameters())
        output = name if dtype == self.norm_dtype else f"{name}.exact"
        x = self.node("LayerNormalization", output, x, weight, bias, axis=-1, epsilon=layer.eps)
        return self.cast(name, x, dtype, self.norm_dtype)

    def gelu(self, name, x):
        """x * Phi(x), Phi the normal distribution function; one node from opset 20 on."""
        if self.opset >= 20:
            return self.node("Gelu", name, x)
        scaled = self.node("Div", f"{name}.scaled", x, self.constant(f"{name}.root", math.sqrt(2)))
        erf = self.node("Erf", f"{name}.erf", scaled)
        phi = self.node("Add", f"{name}.phi", erf, self.constant(f"{name}.one", 1.0))
        return self.node("Mul", name, self.node("Mul", f"{name}.double", x, phi), self.constant(f"{name}.half", 0.5))


def build_graph(backbone: torch.nn.Module, height: int | None = None, width: int | None = None,
                batch: int | None = None, precision: str = "fp32", opset: int = 18, heads: str = "each",
                patch_tokens: bool = False, last_layers: int = 0, pixels: str | None = None, mean=None, std=None,
                classifier: torch.nn.Linear | None = None, n_last_blocks: int = 1,
                avgpool: bool = False) -> onnx.ModelProto:
    """Build the graph of a VisionTransformer: image -> features, attention and, on request, tokens and logits.

    Args:
        height, width: pixels; None for both makes them dynamic.
        batch: batch size; None makes it dynamic.
        precision, opset: see Graph.
        heads: "each" gives attention [B, heads, H/p, W/p], "mean" [B, H/p, W/p].
        patch_tokens: add the output `patch_tokens` [B, N, D], after the final norm.
        last_layers: add the outputs `layer_1` to `layer_n`, all tokens [B, 1+N, D] after each of the last n blocks,
            in their order, the final norm applied.
        pixels: "nchw" or "nhwc" takes uint8 pixels and normalizes them by mean and std; None takes normalized images.
        mean, std: of each channel, of values in [0, 1].
        classifier: adds the output `logits` [B, K], from the CLS tokens of the last `n_last_blocks` blocks after the
            final norm and, with `avgpool`, the mean patch token.
    """
    graph, depth, D = Graph(opset, precision), len(backbone.blocks), backbone.embed_dim
    sizes = {"batch": batch, "heads": backbone.num_heads}
    if height:
        rows, cols = height // backbone.patch_size, width // backbone.patch_size
        sizes |= dict(height=height, width=width, rows=rows, cols=cols, patches=rows * cols, tokens=1 + rows * cols)
    outputs, inputs, cls_only = {}, [], not (patch_tokens or last_layers or avgpool)
    x = add_pixels(graph, pixels, mean, std) if pixels else "image"
    x = graph.cast("image.half", x, graph.dtype, np.float32 if pixels else graph.norm_dtype)
    x = add_tokens(graph, backbone, x, sizes)
    for i, block in enumerate(backbone.blocks, start=1):
        x, softmax = add_block(graph, f"blocks.{i - 1}", block, x, i == depth, cls_only)
        if i > depth - last_layers:
            final = graph.norm(f"layer_{i - depth + last_layers}", x, backbone.norm, graph.norm_dtype)
            outputs[final] = ["tokens", D]
        if classifier and depth - n_last_blocks < i < depth:
            token = graph.node("Slice", f"logits.token_{i}", x, (0,), (1,), (1,))
            token = graph.norm(f"logits.norm_{i}", token, backbone.norm, graph.norm_dtype)
            inputs.append(graph.node("Reshape", f"logits.cls_{i}", token, (0, D)))
    if not last_layers:
        final = graph.norm("norm", x, backbone.norm, graph.norm_dtype)
    cls = final if cls_only else graph.node("Slice", "norm.cls", final, (0,), (1,), (1,))
    outputs[graph.node("Reshape", "features", cls, (0, D))] = [D]
    if patch_tokens:
        outputs[graph.node("Slice", "patch_tokens", final, (1,), (END,), (1,))] = ["patches", D]
    outputs[add_attention_maps(graph, softmax, heads, sizes)] = ["heads"] * (heads == "each") + ["rows", "cols"]
    if classifier:
        inputs.append("features")
        if avgpool:
            patches = graph.node("Slice", "logits.patches", final, (1,), (END,), (1,))
            inputs.append(graph.node("ReduceMean", "logits.pooled", patches, (1,), keepdims=0))
        x = graph.node("Concat", "logits.input", *inputs, axis=1)
        graph.linear("logits", x, classifier.weight, classifier.bias, graph.norm_dtype)
        outputs["logits"] = [classifier.out_features]

    def value_info(name, dtype, shape):  # dynamic sides have a name in place of a size
        return helper.make_tensor_value_info(name, dtype, [sizes.get(side) or side for side in ("batch", *shape)])

    dtype, channels = TYPES[graph.norm_dtype], backbone.in_chans
    shape = ("height", "width", channels) if pixels == "nhwc" else (channels, "height", "width")
    image = value_info("image", TensorProto.UINT8 if pixels else dtype, shape)
    outputs = [value_info(name, dtype, shape) for name, shape in outputs.items()]
    proto = helper.make_graph(graph.nodes, "dino", [image], outputs, list(graph.constants.values()))
    opset = helper.make_opsetid("", opset)
    return helper.make_model(proto, opset_imports=[opset], ir_version=helper.find_min_ir_version_for([opset]))


def add_pixels(graph, layout, mean, std):
    """uint8 pixels -> normalized float32 image [B, C, H, W]."""
    x = graph.node("Cast", "image.float", "image", to=TensorProto.FLOAT)
    if layout == "nhwc":
        x = graph.node("Transpose", "image.nchw", x, perm=(0, 3, 1, 2))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    x = graph.node("Mul", "image.scaled", x, graph.constant("image.scale", 1 / (255 * std), np.float32))
    return graph.node("Add", "image.normalized", x, graph.constant("image.shift", -mean / std, np.float32))


def add_tokens(graph, backbone, image, sizes):
    """Image [B, C, H, W] -> tokens with their positions [B, 1+N, D]."""
    D, x, projection = backbone.embed_dim, image, backbone.patch_embed.proj
    for i, layer in enumerate(backbone.patch_embed.stem if backbone.conv_stem else ()):
        x = graph.conv(f"patch_embed.stem.{i}.conv", x, layer.conv, fuse_norm(layer.conv, layer.norm))
        x = graph.node("Relu", f"patch_embed.stem.{i}", x)
    patches = graph.conv("patch_embed", x, projection, projection.parameters())
    flat = graph.node("Reshape", "patch_embed.flat", patches, (0, D, -1))
    flat = graph.node("Transpose", "patch_embed.tokens", flat, perm=(0, 2, 1))
    if "rows" in sizes:
        positions = graph.constant("positions", backbone.interpolate_pos_encoding(sizes["rows"], sizes["cols"])[:, 1:])
    else:
        positions = add_positions(graph, backbone, patches)
    patches = graph.node("Add", "patch_tokens.placed", flat, positions)
    cls = (backbone.cls_token + backbone.pos_embed[:, :1]).expand(sizes["batch"] or 1, 1, D)
    cls = graph.constant("cls_token", cls)
    if not sizes["batch"]:
        count = graph.node("Shape", "batch", image, start=0, end=1)
        cls = graph.node("Expand", "cls_tokens", cls, graph.node("Concat", "cls_token.shape", count, (1, D), axis=0))
    return graph.node("Concat", "tokens", cls, patches, axis=1)


def fuse_norm(conv, norm):
    """Weight and bias of a convolution with the running statistics, weight and bias of the batch norm behind it."""
    return fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight,
                                norm.bias)


def add_positions(graph, backbone, patches):
    """Position embedding for patches [B, D, rows, cols] as in VisionTransformer.interpolate_pos_encoding: [1, N, D].

    The scale is (side + 0.1) / grid, but exactly 1 if the grid is the learned one.
    """
    D, grid = backbone.embed_dim, backbone.grid
    sides = graph.node("Shape", "grid", patches, start=2, end=4)
    same = graph.node("Equal", "grid.same", sides, grid)
    differs = graph.node("Cast", "grid.differs", graph.node("Not", "grid.not_same", same), to=TensorProto.FLOAT)
    either = graph.node("ReduceMax", "grid.either", differs, keepdims=1)
    offset = graph.node("Mul", "grid.offset", either, graph.constant("grid.tenth", 0.1, np.float32))
    side = graph.node("Add", "grid.shifted", graph.node("Cast", "grid.float", sides, to=TensorProto.FLOAT), offset)
    scale = graph.node("Div", "grid.scale", side, graph.constant("grid.learned", grid, np.float32))
    scales = graph.node("Concat", "grid.scales", graph.constant("grid.ones", (1, 1), np.float32), scale, axis=0)
    learned = backbone.pos_embed[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)  # [1, D, rows, cols]
    resized = graph.node("Resize", "positions.resized", graph.constant("positions.learned", learned, np.float32), "",
                         scales, mode="cubic", cubic_coeff_a=-0.75, coordinate_transformation_mode="half_pixel")
    flat = graph.node("Reshape", "positions.flat", resized, (0, D, -1))
    flat = graph.node("Transpose", "positions.tokens", flat, perm=(0, 2, 1))
    return graph.cast("positions", flat, graph.dtype, np.float32)


def add_block(graph, name, block, x, is_last, cls_only):
    """Tokens [B, 1+N, D] -> tokens, or of the last block the CLS token alone [B, 1, D]; and the last one's softmax."""
    queries = tokens = graph.norm(f"{name}.norm1", x, block.norm1, graph.dtype)
    if is_last and cls_only:
        queries, x = (graph.node("Slice", f"{y}.cls", y, (0,), (1,), (1,)) for y in (tokens, x))
    branch, softmax = add_attention(graph, f"{name}.attn", block.attn, queries, tokens, is_last)
    x = graph.node("Add", f"{name}.attended", x, branch)
    tokens = graph.norm(f"{name}.norm2", x, block.norm2, graph.dtype)
    hidden = graph.gelu(f"{name}.mlp.gelu", graph.linear(f"{name}.mlp.fc1", tokens, *block.mlp.fc1.parameters()))
    branch = graph.linear(f"{name}.mlp.fc2", hidden, *block.mlp.fc2.parameters())
    return graph.node("Add", f"{name}.output", x, branch), softmax


def add_attention(graph, name, attention, queries, tokens, with_softmax):
    """Queries [B, Q, D] and tokens [B, 1+N, D] -> output [B, Q, D] and the softmax [B, heads, Q, 1+N].

    Opset 23 has attention as one node, without access to the softmax, which is then None.
    """
    D, heads, dtype = attention.proj.in_features, attention.num_heads, graph.dtype
    (query, key, value), (q_bias, k_bias, v_bias) = (p.split(D) for p in attention.qkv.parameters())
    scale, softmax = (D // heads) ** -0.5, None
    q = graph.linear(f"{name}.q", queries, query * scale, q_bias * scale)
    k = graph.linear(f"{name}.k", tokens, key, k_bias)
    v = graph.linear(f"{name}.v", tokens, value, v_bias)
    if graph.opset >= 23 and not with_softmax:
        x = graph.node("Attention", f"{name}.fused", q, k, v, scale=1.0, q_num_heads=heads, kv_num_heads=heads,
                       softmax_precision=TYPES[graph.norm_dtype])
    else:
        q, k, v = (graph.node("Reshape", f"{x}.split", x, (0, 0, heads, D // heads)) for x in (q, k, v))
        q, v = (graph.node("Transpose", f"{x}.heads", x, perm=(0, 2, 1, 3)) for x in (q, v))
        k = graph.node("Transpose", f"{k}.heads", k, perm=(0, 2, 3, 1))
        scores = graph.node("MatMul", f"{name}.scores", q, k)
        scores = graph.cast(f"{name}.scores.exact", scores, graph.norm_dtype, dtype)
        softmax = graph.node("Softmax", f"{name}.softmax", scores, axis=-1)
        weights = graph.cast(f"{name}.weights", softmax, dtype, graph.norm_dtype)
        x = graph.node("MatMul", f"{name}.gathered", weights, v)
        x = graph.node("Transpose", f"{name}.together", x, perm=(0, 2, 1, 3))
        x = graph.node("Reshape", f"{name}.joined", x, (0, 0, D))
    return graph.linear(f"{name}.proj", x, *attention.proj.parameters()), softmax


def add_attention_maps(graph, softmax, heads, sizes):
    """Softmax [B, heads, 1+N or 1, 1+N] -> CLS over patches [B, heads, rows, cols] or, their mean, [B, rows, cols]."""
    maps, leading = graph.node("Slice", "attention.row", softmax, (0, 1), (1, END), (2, 3)), (0, sizes["heads"])
    if heads == "mean":
        maps, leading = graph.node("ReduceMean", "attention.mean", maps, (1,), keepdims=0), (0,)
    if "rows" in sizes:
        return graph.node("Reshape", "attention", maps, (*leading, sizes["rows"], sizes["cols"]))
    return graph.node("Reshape", "attention", maps, graph.node("Concat", "attention.shape", leading, "grid", axis=0))
