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
import torch
from onnx import TensorProto, helper, numpy_helper

TYPES = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}


class Graph:
    """Nodes and constants in the order in which they are added; every method returns the name of its result.

    Args:
        opset: version of ONNX's operators, 17 or above.
        precision: "fp32"; "fp16"; or "mixed": products in half, norms, softmax, input and outputs in float32.
    """

    def __init__(self, opset, precision):
        self.opset, self.nodes, self.constants = opset, [], {}
        self.dtype = np.float32 if precision == "fp32" else np.float16
        self.exact = np.float16 if precision == "fp16" else np.float32  # of norms, softmax, input and outputs

    def node(self, kind, name, *inputs, **attributes):
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def constant(self, name, value, dtype=None):
        value = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value, dtype or self.dtype), name)
        return name

    def integers(self, name, *values):
        return self.constant(name, values, np.int64)

    def cast(self, name, x, to, of):
        """x, which is of type `of`, as type `to`: no node if they are the same."""
        return x if to == of else self.node("Cast", name, x, to=TYPES[to])

    def reshape(self, name, x, *shape):
        """0 keeps a side as it is, -1 is what is left."""
        return self.node("Reshape", name, x, self.integers(f"{name}.shape", *shape))

    def slice(self, name, x, **ends):
        """x from starts to ends along axes, each a tuple."""
        return self.node("Slice", name, x, *(self.integers(f"{name}.{key}", *ends[key])
                                             for key in ("starts", "ends", "axes")))

    def linear(self, name, x, weight, bias):
        """x [..., in] by weight [out, in] and bias [out]."""
        product = self.node("MatMul", f"{name}.product", x, self.constant(f"{name}.weight", weight.T))
        return self.node("Add", name, product, self.constant(f"{name}.bias", bias))

    def norm(self, name, x, module, exact=False):
        """LayerNorm over the last axis; `exact` leaves it in the type of norms."""
        x = self.cast(f"{name}.input", x, self.exact, self.dtype)
        parts = [self.constant(f"{name}.{part}", getattr(module, part), self.exact) for part in ("weight", "bias")]
        of = self.exact if exact else self.dtype
        output = name if of == self.exact else f"{name}.exact"
        x = self.node("LayerNormalization", output, x, *parts, axis=-1, epsilon=module.eps)
        return self.cast(name, x, of, self.exact)

    def gelu(self, name, x):
        """x * Phi(x), Phi being the normal distribution; one node from opset 20 on."""
        if self.opset >= 20:
            return self.node("Gelu", name, x)
        scaled = self.node("Div", f"{name}.scaled", x, self.constant(f"{name}.root", math.sqrt(2)))
        erf = self.node("Erf", f"{name}.erf", scaled)
        phi = self.node("Add", f"{name}.phi", erf, self.constant(f"{name}.one", 1.0))
        return self.node("Mul", name, self.node("Mul", f"{name}.double", x, phi), self.constant(f"{name}.half", 0.5))


def qkv(graph, name, attention, queries, tokens):
    """q [B, Q, D] of the queries, k and v [B, 1+N, D] of all tokens; q . k is scaled already."""
    D = attention.proj.in_features
    weights, biases = attention.qkv.weight.split(D), attention.qkv.bias.split(D)
    scale = (D // attention.num_heads) ** -0.5
    return (graph.linear(f"{name}.q", queries, weights[0] * scale, biases[0] * scale),
            graph.linear(f"{name}.k", tokens, weights[1], biases[1]),
            graph.linear(f"{name}.v", tokens, weights[2], biases[2]))


def attend(graph, name, attention, queries, tokens):
    """[B, Q, D] and [B, 1+N, D] -> what the queries gather [B, Q, D], and the softmax [B, heads, Q, 1+N]."""
    D, heads = attention.proj.in_features, attention.num_heads
    q, k, v = (graph.node("Transpose", f"{part}.heads", graph.reshape(f"{part}.split", part, 0, 0, heads, D // heads),
                          perm=(0, 2, 3, 1) if part.endswith(".k") else (0, 2, 1, 3))
               for part in qkv(graph, name, attention, queries, tokens))
    scores = graph.cast(f"{name}.scores.exact", graph.node("MatMul", f"{name}.scores", q, k), graph.exact, graph.dtype)
    softmax = graph.node("Softmax", f"{name}.softmax", scores, axis=-1)
    weights = graph.cast(f"{name}.weights", softmax, graph.dtype, graph.exact)
    gathered = graph.node("MatMul", f"{name}.gathered", weights, v)
    together = graph.node("Transpose", f"{name}.together", gathered, perm=(0, 2, 1, 3))
    x = graph.reshape(f"{name}.joined", together, 0, 0, D)
    return graph.linear(f"{name}.proj", x, attention.proj.weight, attention.proj.bias), softmax


def attend_fused(graph, name, attention, tokens):
    """The same as one node, which opset 23 has, without the softmax."""
    x = graph.node("Attention", f"{name}.fused", *qkv(graph, name, attention, tokens, tokens), scale=1.0,
                   q_num_heads=attention.num_heads, kv_num_heads=attention.num_heads,
                   softmax_precision=TYPES[graph.exact])
    return graph.linear(f"{name}.proj", x, attention.proj.weight, attention.proj.bias)


def block(graph, name, module, x, cls_only=False, with_softmax=False):
    """Tokens [B, 1+N, D] -> tokens, or the CLS token alone [B, 1, D], and the softmax if it is asked for."""
    tokens, softmax = graph.norm(f"{name}.norm1", x, module.norm1), None
    if with_softmax or graph.opset < 23:
        queries = tokens
        if cls_only:
            queries, x = (graph.slice(f"{y}.cls", y, starts=(0,), ends=(1,), axes=(1,)) for y in (tokens, x))
        branch, softmax = attend(graph, f"{name}.attn", module.attn, queries, tokens)
    else:
        branch = attend_fused(graph, f"{name}.attn", module.attn, tokens)
    x = graph.node("Add", f"{name}.attended", x, branch)
    branch = graph.norm(f"{name}.norm2", x, module.norm2)
    branch = graph.gelu(f"{name}.mlp.gelu", graph.linear(f"{name}.mlp.fc1", branch, module.mlp.fc1.weight,
                                                         module.mlp.fc1.bias))
    branch = graph.linear(f"{name}.mlp.fc2", branch, module.mlp.fc2.weight, module.mlp.fc2.bias)
    return graph.node("Add", f"{name}.output", x, branch), softmax


def embed(graph, backbone, image, rows, cols, batch):
    """Image [B, 3, H, W] -> tokens with their positions [B, 1+N, D]; rows and cols None may vary."""
    D, projection = backbone.embed_dim, backbone.patch_embed.proj
    weight, bias = (graph.constant(f"patch_embed.{part}", getattr(projection, part)) for part in ("weight", "bias"))
    patches = graph.node("Conv", "patch_embed", image, weight, bias, strides=projection.stride,
                         kernel_shape=projection.kernel_size)
    flat = graph.node("Transpose", "patch_embed.tokens", graph.reshape("patch_embed.flat", patches, 0, D, -1),
                      perm=(0, 2, 1))
    if rows is None:
        positions, first = positions_at_run_time(graph, backbone, patches), backbone.pos_embed[:, :1]
    else:
        embedding = backbone.interpolate_pos_encoding(rows, cols)
        positions, first = graph.constant("positions", embedding[:, 1:]), embedding[:, :1]
    patches = graph.node("Add", "patch_tokens.placed", flat, positions)
    cls = backbone.cls_token + first
    if batch is None:
        cls = graph.constant("cls_token", cls)
        count = graph.node("Shape", "batch", image, start=0, end=1)
        shape = graph.node("Concat", "cls_token.shape", count, graph.integers("cls_token.sides", 1, D), axis=0)
        cls = graph.node("Expand", "cls_tokens", cls, shape)
    else:
        cls = graph.constant("cls_tokens", cls.expand(batch, 1, D))
    return graph.node("Concat", "tokens", cls, patches, axis=1)


def positions_at_run_time(graph, backbone, patches):
    """Positions of the patches [B, D, rows, cols] as VisionTransformer.interpolate_pos_encoding has them: [1, N, D].

    The scale is (side + 0.1) / grid, but exactly 1 where the grid is the one that was learnt.
    """
    D, grid = backbone.embed_dim, backbone.grid
    sides = graph.node("Shape", "grid", patches, start=2, end=4)
    same = graph.node("Equal", "grid.same", sides, graph.integers("grid.learnt", *grid))
    differs = graph.node("Cast", "grid.differs", graph.node("Not", "grid.not_same", same), to=TensorProto.FLOAT)
    either = graph.node("ReduceMax", "grid.either", differs, keepdims=1)
    offset = graph.node("Mul", "grid.offset", either, graph.constant("grid.tenth", 0.1, np.float32))
    side = graph.node("Add", "grid.shifted", graph.node("Cast", "grid.float", sides, to=TensorProto.FLOAT), offset)
    scale = graph.node("Div", "grid.scale", side, graph.constant("grid.learnt.float", grid, np.float32))
    scales = graph.node("Concat", "grid.scales", graph.constant("grid.ones", (1, 1), np.float32), scale, axis=0)
    learnt = backbone.pos_embed[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)  # [1, D, rows, cols]
    resized = graph.node("Resize", "positions.resized", graph.constant("positions.learnt", learnt, np.float32), "",
                         scales, mode="cubic", cubic_coeff_a=-0.75, coordinate_transformation_mode="half_pixel")
    flat = graph.reshape("positions.flat", resized, 0, D, -1)
    flat = graph.node("Transpose", "positions.tokens", flat, perm=(0, 2, 1))
    return graph.cast("positions", flat, graph.dtype, np.float32)


def build_graph(backbone, height=None, width=None, batch=None, precision="fp32", opset=18, heads="each",
                patch_tokens=False, last_layers=0, pixels=None, mean=None, std=None):
    """The graph of a VisionTransformer: image -> features, attention and by request more.

    Args:
        height, width: pixels; None for both lets them vary.
        batch: number of images; None lets it vary.
        precision, opset: see Graph.
        heads: "each" gives attention [B, heads, H/p, W/p], "mean" [B, H/p, W/p].
        patch_tokens: also give `patch_tokens` [B, N, D], after the final norm.
        last_layers: also give `layer_1` to `layer_n`, all tokens [B, 1+N, D] after each of the last n blocks,
            the final norm applied, in their order.
        pixels: "nchw" or "nhwc" takes uint8 pixels and normalises them by mean and std; None takes what is
            normalised already.
        mean, std: of each channel, of values in [0, 1].

    Returns:
        onnx.ModelProto.
    """
    graph = Graph(opset, precision)
    p, D, channels = backbone.patch_size, backbone.embed_dim, backbone.in_chans
    rows, cols = (None, None) if height is None else (height // p, width // p)
    with torch.no_grad():
        x = "image"
        if pixels:
            x = graph.node("Cast", "image.float", x, to=TensorProto.FLOAT)
            if pixels == "nhwc":
                x = graph.node("Transpose", "image.nchw", x, perm=(0, 3, 1, 2))
            mean, std = (torch.tensor(values).view(1, channels, 1, 1) for values in (mean, std))
            x = graph.node("Mul", "image.scaled", x, graph.constant("image.scale", 1 / (255 * std), np.float32))
            x = graph.node("Add", "image.normalized", x, graph.constant("image.shift", -mean / std, np.float32))
        x = graph.cast("image.half", x, graph.dtype, np.float32 if pixels else graph.exact)
        x = embed(graph, backbone, x, rows, cols, batch)

        outputs, depth = {}, len(backbone.blocks)
        cls_only = not (patch_tokens or last_layers)
        for i, module in enumerate(backbone.blocks):
            last = i == depth - 1
            x, softmax = block(graph, f"blocks.{i}", module, x, cls_only and last, last)
            if i >= depth - last_layers:
                layer = graph.norm(f"layer_{i - depth + last_layers + 1}", x, backbone.norm, exact=True)
                outputs[layer] = ["tokens", D]
        final = layer if last_layers else graph.norm("norm", x, backbone.norm, exact=True)
        cls = final if cls_only else graph.slice("norm.cls", final, starts=(0,), ends=(1,), axes=(1,))
        outputs[graph.reshape("features", cls, 0, D)] = [D]
        if patch_tokens:
            patches = graph.slice("patch_tokens", final, starts=(1,), ends=(2**31 - 1,), axes=(1,))
            outputs[patches] = ["patches", D]
        row = graph.slice("attention.row", softmax, starts=(0, 1), ends=(1, 2**31 - 1), axes=(2, 3))
        attention = attention_on_grid(graph, backbone, row, rows, cols, heads)
        outputs[attention] = ["heads"] * (heads == "each") + ["rows", "cols"]
    return finish(graph, outputs, backbone, height, width, batch, pixels)


def attention_on_grid(graph, backbone, maps, rows, cols, heads):
    """[B, heads, 1, N] -> [B, heads, rows, cols] or, the mean, [B, rows, cols]."""
    count = backbone.num_heads
    if heads == "mean":
        inputs, attributes = [maps], {"axes": (1,)}
        if graph.opset >= 18:  # axes became an input
            inputs, attributes = [maps, graph.integers("attention.axes", 1)], {}
        maps = graph.node("ReduceMean", "attention.mean", *inputs, keepdims=0, **attributes)
    leading = (0, count) if heads == "each" else (0,)
    if rows is not None:
        return graph.reshape("attention", maps, *leading, rows, cols)
    shape = graph.node("Concat", "attention.shape", graph.integers("attention.leading", *leading), "grid", axis=0)
    return graph.node("Reshape", "attention", maps, shape)


def finish(graph, outputs, backbone, height, width, batch, pixels):
    """The ModelProto of a graph with these outputs, {name: sides after the batch}."""
    p, sizes = backbone.patch_size, {"heads": backbone.num_heads, "batch": batch or "batch"}
    if height is not None:
        rows, cols = height // p, width // p
        sizes |= {"rows": rows, "cols": cols, "patches": rows * cols, "tokens": 1 + rows * cols}
    sides = {"nhwc": ["height", "width", backbone.in_chans]}.get(pixels, [backbone.in_chans, "height", "width"])
    sizes |= {"height": height or "height", "width": width or "width"}

    def value(name, kind, shape):
        return helper.make_tensor_value_info(name, kind, [sizes.get(side, side) for side in ["batch", *shape]])

    inputs = [value("image", TensorProto.UINT8 if pixels else TYPES[graph.exact], sides)]
    outputs = [value(name, TYPES[graph.exact], shape) for name, shape in outputs.items()]
    proto = helper.make_graph(graph.nodes, "dino", inputs, outputs, list(graph.constants.values()))
    opset = helper.make_opsetid("", graph.opset)
    return helper.make_model(proto, opset_imports=[opset], ir_version=helper.find_min_ir_version_for([opset]),
                             producer_name="dino")
