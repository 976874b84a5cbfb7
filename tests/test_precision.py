from pathlib import Path

import pytest
import torch

from precision import allow_tf32, autocast, resolve


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_products_are_made_in_it(precision):
    x, dtype = torch.randn(4, 4), {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with autocast("cpu", precision):
        assert (x @ x).dtype == dtype
    assert (x @ x).dtype == torch.float32


def test_auto_is_bf16_where_the_processor_multiplies_it():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert resolve("auto", "cpu") == ("bf16" if "avx512_bf16" in flags else "fp32")
    assert resolve("auto", "mps") == "fp32"
    assert [resolve(name, "cpu") for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]


def test_tf32_stands_beside_half_precision_alone():
    before = torch.backends.cuda.matmul.allow_tf32
    for precision, allowed in (("bf16", True), ("fp32", False), ("fp16", True)):
        allow_tf32(precision)
        assert torch.backends.cuda.matmul.allow_tf32 == allowed
    torch.backends.cuda.matmul.allow_tf32 = before
