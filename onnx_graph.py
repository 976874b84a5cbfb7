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

TYPES = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}


class Graph:
    """Nodes and constants in the order in which they are added; every method returns the name of its result.

    Args:
        opset: version of ONNX's operators, 17 or above.
        precision: "fp32"; "fp16"; or "mixed": matrix products in fp16, norms, softmax, input and outputs in fp32.
    """

    def __init__(self, opset: int, precision: str):
        self.opset, self.nodes, self.constants = opset, [], {}
        self.dtype = np.float32 if precision == "fp32" else np.float16
        self.norm_dtype = np.float16 if precision == "fp16" else np.float32  # of softmax, input and outputs too

    def node(self, op, name, *inputs, **attributes):
        self.nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def constant(self, name, value, dtype=None):
        value = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value, dtype or self.dtype), name)
        return name

    def integers(self, name, *values):
        return self.constant(name, values, np.int64)

    def cast(self, name, x, dtype, from_dtype):
        return x if dtype == from_dtype else self.node("Cast", name, x, to=TYPES[dtype])

    def reshape(self, name, x, *shape):
        """x in a shape in which 0 keeps a side and -1 is inferred."""
        return self.node("Reshape", name, x, self.integers(f"{name}.shape", *shape))

    def transpose(self, name, x, *perm):
        return self.node("Transpose", name, x, perm=perm)

    def slice(self, name, x, **bounds):
        """x from starts to ends along axes, each a tuple."""
        return self.node("Slice", name, x, *(self.integers(f"{name}.{key}", *bounds[key])
                                             for key in ("starts", "ends", "axes")))

    def linear(self, name, x, weight, bias):
        """x [..., in] times weight [out, in] plus bias [out]."""
        product = self.node("MatMul", f"{name}.product", x, self.constant(f"{name}.weight", weight.T))
        return self.node("Add", name, product, self.constant(f"{name}.bias", bias))

    def norm(self, name, x, layer, dtype=None):
        """LayerNorm over the last axis, in norm_dtype; its output in `dtype`, that of matrix products by default."""
        x = self.cast(f"{name}.input", x, self.norm_dtype, self.dtype)
        weight, bias = (self.constant(f"{name}.{part}", getattr(layer, part), self.norm_dtype)
                        for part in ("weight", "bias"))
        dtype = dtype or self.dtype
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
                patch_tokens: bool = False, last_layers: int = 0, pixels: str | None = None, mean=None,
                std=None) -> onnx.ModelProto:
    """Build the graph of a VisionTransformer: image -> features, attention and, on request, tokens.

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
    """
    graph, depth, D = Graph(opset, precision), len(backbone.blocks), backbone.embed_dim
    rows, cols = (None, None) if height is None else (height // backbone.patch_size, width // backbone.patch_size)
    outputs, cls_only = {}, not (patch_tokens or last_layers)
    with torch.no_grad():
        x = add_pixels(graph, pixels, mean, std) if pixels else "image"
        x = graph.cast("image.half", x, graph.dtype, np.float32 if pixels else graph.norm_dtype)
        x = add_tokens(graph, backbone, x, rows, cols, batch)
        for i, block in enumerate(backbone.blocks, start=1):
            is_last = i == depth
            x, softmax = add_block(graph, f"blocks.{i - 1}", block, x, cls_only and is_last, is_last)
            if i > depth - last_layers:
                final = graph.norm(f"layer_{i - depth + last_layers}", x, backbone.norm, graph.norm_dtype)
                outputs[final] = ["tokens", D]
        if not last_layers:
            final = graph.norm("norm", x, backbone.norm, graph.norm_dtype)
        cls = final if cls_only else graph.slice("norm.cls", final, starts=(0,), ends=(1,), axes=(1,))
        outputs[graph.reshape("features", cls, 0, D)] = [D]
        if patch_tokens:
            patches = graph.slice("patch_tokens", final, starts=(1,), ends=(2**31 - 1,), axes=(1,))
            outputs[patches] = ["patches", D]
        cls_row = graph.slice("attention.row", softmax, starts=(0, 1), ends=(1, 2**31 - 1), axes=(2, 3))
        attention = add_attention_maps(graph, backbone, cls_row, rows, cols, heads)
        outputs[attention] = ["heads"] * (heads == "each") + ["rows", "cols"]
    return build_model(graph, outputs, backbone, height, width, batch, pixels)


def add_pixels(graph, layout, mean, std):
    """uint8 pixels -> normalized float32 image [B, C, H, W]."""
    x = graph.node("Cast", "image.float", "image", to=TensorProto.FLOAT)
    if layout == "nhwc":
        x = graph.transpose("image.nchw", x, 0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    x = graph.node("Mul", "image.scaled", x, graph.constant("image.scale", 1 / (255 * std), np.float32))
    return graph.node("Add", "image.normalized", x, graph.constant("image.shift", -mean / std, np.float32))


def add_tokens(graph, backbone, image, rows, cols, batch):
    """Image [B, C, H, W] -> tokens with their positions [B, 1+N, D]; rows and cols None are dynamic."""
    D, projection = backbone.embed_dim, backbone.patch_embed.proj
    weight, bias = (graph.constant(f"patch_embed.{part}", getattr(projection, part)) for part in ("weight", "bias"))
    patches = graph.node("Conv", "patch_embed", image, weight, bias, strides=projection.stride,
                         kernel_shape=projection.kernel_size)
    flat = graph.transpose("patch_embed.tokens", graph.reshape("patch_embed.flat", patches, 0, D, -1), 0, 2, 1)
    if rows is None:
        positions = add_positions(graph, backbone, patches)
    else:
        positions = graph.constant("positions", backbone.interpolate_pos_encoding(rows, cols)[:, 1:])
    patches = graph.node("Add", "patch_tokens.placed", flat, positions)
    cls = backbone.cls_token + backbone.pos_embed[:, :1]
    if batch is None:
        count = graph.node("Shape", "batch", image, start=0, end=1)
        shape = graph.node("Concat", "cls_token.shape", count, graph.integers("cls_token.sides", 1, D), axis=0)
        cls = graph.node("Expand", "cls_tokens", graph.constant("cls_token", cls), shape)
    else:
        cls = graph.constant("cls_tokens", cls.expand(batch, 1, D))
    return graph.node("Concat", "tokens", cls, patches, axis=1)


def add_positions(graph, backbone, patches):
    """Position embedding for patches [B, D, rows, cols] as in VisionTransformer.interpolate_pos_encoding: [1, N, D].

    The scale is (side + 0.1) / grid, but exactly 1 if the grid is the learned one.
    """
    D, grid = backbone.embed_dim, backbone.grid
    sides = graph.node("Shape", "grid", patches, start=2, end=4)
    same = graph.node("Equal", "grid.same", sides, graph.integers("grid.learned", *grid))
    differs = graph.node("Cast", "grid.differs", graph.node("Not", "grid.not_same", same), to=TensorProto.FLOAT)
    either = graph.node("ReduceMax", "grid.either", differs, keepdims=1)
    offset = graph.node("Mul", "grid.offset", either, graph.constant("grid.tenth", 0.1, np.float32))
    side = graph.node("Add", "grid.shifted", graph.node("Cast", "grid.float", sides, to=TensorProto.FLOAT), offset)
    scale = graph.node("Div", "grid.scale", side, graph.constant("grid.learned.float", grid, np.float32))
    scales = graph.node("Concat", "grid.scales", graph.constant("grid.ones", (1, 1), np.float32), scale, axis=0)
    learned = backbone.pos_embed[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)  # [1, D, rows, cols]
    resized = graph.node("Resize", "positions.resized", graph.constant("positions.learned", learned, np.float32), "",
                         scales, mode="cubic", cubic_coeff_a=-0.75, coordinate_transformation_mode="half_pixel")
    flat = graph.transpose("positions.tokens", graph.reshape("positions.flat", resized, 0, D, -1), 0, 2, 1)
    return graph.cast("positions", flat, graph.dtype, np.float32)


def add_block(graph, name, block, x, cls_only=False, with_softmax=False):
    """Tokens [B, 1+N, D] -> tokens, or the CLS token alone [B, 1, D]; and the softmax if it is computed."""
    tokens, softmax = graph.norm(f"{name}.norm1", x, block.norm1), None
    if with_softmax or graph.opset < 23:
        queries = tokens
        if cls_only:
            queries, x = (graph.slice(f"{y}.cls", y, starts=(0,), ends=(1,), axes=(1,)) for y in (tokens, x))
        branch, softmax = add_attention(graph, f"{name}.attn", block.attn, queries, tokens)
    else:
        branch = add_fused_attention(graph, f"{name}.attn", block.attn, tokens)
    x = graph.node("Add", f"{name}.attended", x, branch)
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    branch = graph.linear(f"{name}.mlp.fc1", graph.norm(f"{name}.norm2", x, block.norm2), fc1.weight, fc1.bias)
    branch = graph.linear(f"{name}.mlp.fc2", graph.gelu(f"{name}.mlp.gelu", branch), fc2.weight, fc2.bias)
    return graph.node("Add", f"{name}.output", x, branch), softmax


def add_qkv(graph, name, attention, queries, tokens):
    """q [B, Q, D] of the queries, scaled, and k and v [B, 1+N, D] of all tokens."""
    D, scale = attention.proj.in_features, (attention.proj.in_features // attention.num_heads) ** -0.5
    weights, biases = attention.qkv.weight.split(D), attention.qkv.bias.split(D)
    return (graph.linear(f"{name}.q", queries, weights[0] * scale, biases[0] * scale),
            graph.linear(f"{name}.k", tokens, weights[1], biases[1]),
            graph.linear(f"{name}.v", tokens, weights[2], biases[2]))


def add_attention(graph, name, attention, queries, tokens):
    """Queries [B, Q, D] and tokens [B, 1+N, D] -> output [B, Q, D] and the softmax [B, heads, Q, 1+N]."""
    D, heads = attention.proj.in_features, attention.num_heads
    q, k, v = (graph.transpose(f"{part}.heads", graph.reshape(f"{part}.split", part, 0, 0, heads, D // heads),
                               *((0, 2, 3, 1) if part.endswith(".k") else (0, 2, 1, 3)))
               for part in add_qkv(graph, name, attention, queries, tokens))
    scores = graph.node("MatMul", f"{name}.scores", q, k)
    scores = graph.cast(f"{name}.scores.exact", scores, graph.norm_dtype, graph.dtype)
    softmax = graph.node("Softmax", f"{name}.softmax", scores, axis=-1)
    weights = graph.cast(f"{name}.weights", softmax, graph.dtype, graph.norm_dtype)
    gathered = graph.node("MatMul", f"{name}.gathered", weights, v)
    x = graph.reshape(f"{name}.joined", graph.transpose(f"{name}.together", gathered, 0, 2, 1, 3), 0, 0, D)
    return graph.linear(f"{name}.proj", x, attention.proj.weight, attention.proj.bias), softmax


def add_fused_attention(graph, name, attention, tokens):
    """Attention as one node, which opset 23 has, without access to the softmax."""
    x = graph.node("Attention", f"{name}.fused", *add_qkv(graph, name, attention, tokens, tokens), scale=1.0,
                   q_num_heads=attention.num_heads, kv_num_heads=attention.num_heads,
                   softmax_precision=TYPES[graph.norm_dtype])
    return graph.linear(f"{name}.proj", x, attention.proj.weight, attention.proj.bias)


def add_attention_maps(graph, backbone, maps, rows, cols, heads):
    """[B, heads, 1, N] -> [B, heads, rows, cols] or, their mean, [B, rows, cols]."""
    leading = (0, backbone.num_heads)
    if heads == "mean":
        leading = (0,)
        if graph.opset >= 18:  # axes became an input
            maps = graph.node("ReduceMean", "attention.mean", maps, graph.integers("attention.axes", 1), keepdims=0)
        else:
            maps = graph.node("ReduceMean", "attention.mean", maps, axes=(1,), keepdims=0)
    if rows is not None:
        return graph.reshape("attention", maps, *leading, rows, cols)
    shape = graph.node("Concat", "attention.shape", graph.integers("attention.leading", *leading), "grid", axis=0)
    return graph.node("Reshape", "attention", maps, shape)


def build_model(graph, outputs, backbone, height, width, batch, pixels):
    """The ModelProto of a graph with the given outputs, {name: sides after the batch}."""
    sizes = {"batch": batch, "heads": backbone.num_heads, "height": height, "width": width}
    if height is not None:
        rows, cols = height // backbone.patch_size, width // backbone.patch_size
        sizes |= {"rows": rows, "cols": cols, "patches": rows * cols, "tokens": 1 + rows * cols}

    def value_info(name, dtype, shape):  # dynamic sides have a name in place of a size
        return helper.make_tensor_value_info(name, dtype, [sizes.get(side) or side for side in ["batch", *shape]])

    dtype, channels = TYPES[graph.norm_dtype], backbone.in_chans
    shape = ["height", "width", channels] if pixels == "nhwc" else [channels, "height", "width"]
    inputs = [value_info("image", TensorProto.UINT8 if pixels else dtype, shape)]
    outputs = [value_info(name, dtype, shape) for name, shape in outputs.items()]
    proto = helper.make_graph(graph.nodes, "dino", inputs, outputs, list(graph.constants.values()))
    opset = helper.make_opsetid("", graph.opset)
    return helper.make_model(proto, opset_imports=[opset], ir_version=helper.find_min_ir_version_for([opset]),
                             producer_name="dino")
