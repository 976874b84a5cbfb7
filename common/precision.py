"""In what numbers a network computes: weights, losses and optimizer stay float32, products may be half as long.

    with autocast("cuda", "bf16"):
        features = model(images)

This file needs torch and nothing else.
"""

import functools

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, precision):
    """A context in which matrix products are made in fp32, bf16 or fp16."""
    return torch.autocast(torch.device(device).type, DTYPES[precision], enabled=precision != "fp32")


def set_matmul_precision(device, precision, width=128):
    """Let products that stay in float32 be made as fast as that allows.

    CUDA: beside half precision they may keep the 10 bits of fraction that fp16 has (TF32). CPU: by oneDNN in place of
    the BLAS, which takes twice the time on AMD, where oneDNN is found to keep float32's accuracy.

    Args:
        width: of the network; below 128 a call of oneDNN costs more than it saves.
    """
    if torch.device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    elif torch.device(device).type == "cpu":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16" if width >= 128 and is_onednn_exact() else "none"


def reset_matmul_precision(device):
    """Take `fast_products` back: products as torch makes them by itself."""
    if torch.device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    torch.backends.mkldnn.matmul.fp32_precision = "none"


@functools.cache
def is_onednn_exact():
    """Whether oneDNN, given leave to round to bfloat16, does not: without AMX it has no such kernels for float32.

    That leave is how torch is told to ask oneDNN at all.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    a, b = torch.sin(torch.arange(2 * 384 * 384.0)).view(2, 384, 384)
    exact = a.double() @ b.double()
    before, torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision, "bf16"
    product = a @ b
    torch.backends.mkldnn.matmul.fp32_precision = before
    return ((product.double() - exact).norm() / exact.norm()).item() < 1e-5


def resolve_precision(precision, device):
    """What "auto" means on this device: bf16 where it multiplies bfloat16 faster than float32, else fp32."""
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp32"
    return "bf16" if device == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


if __name__ == "__main__":
    a, b = torch.randn(2, 256, 256, dtype=torch.float64)
    for name in DTYPES:
        with autocast("cpu", name):
            product = a.float() @ b.float()
        error = (product.double() - a @ b).norm() / (a @ b).norm()
        print(f"{name}: {product.dtype}, relative error of a product {error:.1e}")
