"""In what numbers a network computes: weights, losses and optimizer stay float32, products may be half as long.

    with autocast("cuda", "bf16"):
        features = model(images)

This file needs torch and nothing else.
"""

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, precision):
    """A context in which matrix products are made in fp32, bf16 or fp16."""
    return torch.autocast(torch.device(device).type, PRECISIONS[precision], enabled=precision != "fp32")


def allow_tf32(precision):
    """Beside half precision, let CUDA's float32 products keep the 10 bits of fraction that fp16 has."""
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"


def resolve(precision, device):
    """What "auto" means on this device: bf16 where it multiplies bfloat16 faster than float32, else fp32."""
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp32"
    return "bf16" if device == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


if __name__ == "__main__":
    a, b = torch.randn(2, 256, 256, dtype=torch.float64)
    for name in PRECISIONS:
        with autocast("cpu", name):
            product = a.float() @ b.float()
        error = (product.double() - a @ b).norm() / (a @ b).norm()
        print(f"{name}: {product.dtype}, relative error of a product {error:.1e}")
