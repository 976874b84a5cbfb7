"""Mixed precision and matmul precision. Weights, loss and optimizer stay float32; autocast covers the rest.

    precision = resolve_precision("auto", "cuda")           # bf16 where the device is fast at it
    set_matmul_precision("cuda", precision)                 # TF32, or oneDNN on a CPU
    with autocast("cuda", precision):
        features = model(images)

This file needs torch only.
"""

import contextlib
import functools

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("auto", *DTYPES)  # values of --precision


def resolve_precision(precision, device):
    """"auto" is bf16 on devices that multiply bfloat16 faster than float32, else fp32."""
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp32"
    return "bf16" if device == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


def autocast(device, precision):
    """Autocast context of a device for fp32 (disabled), bf16 or fp16."""
    return torch.autocast(torch.device(device).type, DTYPES[precision], enabled=precision != "fp32")


class CastTensors(torch.autograd.Function):
    """Copies of tensors in another dtype, and their gradients back, in one launch each."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.dtype = tensors[0].dtype
        return cast_tensors(tensors, dtype)

    @staticmethod
    def backward(ctx, *grads):
        return None, *cast_tensors(grads, ctx.dtype)


def cast_tensors(tensors, dtype):
    """Copies of tensors in another dtype, in one launch."""
    copies = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
    torch._foreach_copy_(copies, tensors)
    return copies


@contextlib.contextmanager
def cast_weights(network, precision):
    """Within the context, linear layers and convolutions use half-precision copies of their weights, made once.

    Autocast would cast each weight by itself: three launches for each of the weights in a step.
    """
    layers = [module for module in network.modules() if type(module) in (nn.Linear, nn.Conv2d)]
    layers = [] if precision == "fp32" else layers
    try:
        for i in range(0, len(layers), 8):  # some blocks at a time, so that DDP sends gradients during backward
            weights = [(layer, name, p) for layer in layers[i:i + 8] for name, p in layer.named_parameters()]
            copies = CastTensors.apply(DTYPES[precision], *(p for _, _, p in weights))
            for (layer, name, _), copy in zip(weights, copies):
                vars(layer)[name] = copy  # found before the parameter, which optimizer and state dict keep
        yield
    finally:
        for layer in layers:
            for name, _ in layer.named_parameters():
                vars(layer).pop(name, None)


def set_matmul_precision(device, precision, width=128):
    """Choose how float32 matrix products are computed.

    CUDA: TF32 next to half precision, full float32 for fp32. CPU: oneDNN instead of the BLAS, which takes twice as long
    on AMD, if oneDNN is found to keep float32's accuracy.

    Args:
        width: embedding dimension of the model; below 128 a call of oneDNN costs more than it saves.
    """
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
    elif torch.device(device).type == "cpu":
        torch.set_float32_matmul_precision("medium" if width >= 128 and is_onednn_exact() else "highest")


def reset_matmul_precision():
    """Undo `set_matmul_precision`: torch's own defaults."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


@functools.cache
def is_onednn_exact():
    """Whether oneDNN keeps float32 where it may round to bfloat16: without AMX it has no such float32 kernels.

    Allowing bfloat16 is the only way to make torch use oneDNN at all, so the accuracy is checked on one product.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    a, b = torch.sin(torch.arange(2 * 384 * 384.0)).view(2, 384, 384)
    exact = a.double() @ b.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    product = a @ b
    torch.set_float32_matmul_precision(before)
    return ((product.double() - exact).norm() / exact.norm()).item() < 1e-5
