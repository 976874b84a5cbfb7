import contextlib
from pathlib import Path

import pytest
import torch

from backbones import build_backbone
from common.precision import (
    autocast,
    cast_weights,
    is_onednn_exact,
    reset_matmul_precision,
    resolve_precision,
    set_matmul_precision,
)
from dino_loss import DINOHead, MultiCropWrapper
from train import compile_blocks
from vit import VisionTransformer


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_autocast_dtype_of_products(precision):
    x, dtype = torch.randn(4, 4), {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with autocast("cpu", precision):
        assert (x @ x).dtype == dtype
    assert (x @ x).dtype == torch.float32


def test_auto_is_bf16_on_processors_with_bf16_instructions():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert resolve_precision("auto", "cpu") == ("bf16" if "avx512_bf16" in flags else "fp32")
    assert resolve_precision("auto", "mps") == "fp32"
    assert [resolve_precision(name, "cpu") for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]


def test_tf32_is_allowed_next_to_half_precision_only():
    before = torch.get_float32_matmul_precision()
    for precision, is_allowed in (("bf16", True), ("fp32", False), ("fp16", True)):
        set_matmul_precision("cuda", precision)
        assert torch.backends.cuda.matmul.allow_tf32 == is_allowed
    reset_matmul_precision()
    assert not torch.backends.cuda.matmul.allow_tf32
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("shape", [(8, 384, 1536), (1561, 384, 384), (2000, 64, 50), (3, 4097, 5)])
def test_products_on_a_cpu_keep_float32_accuracy(shape):
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*size, generator=generator).requires_grad_() for size in ((m, k), (n, k)))
    exact = a.detach().double(), b.detach().double()
    reset_matmul_precision()
    assert torch.get_float32_matmul_precision() == "highest"
    set_matmul_precision("cpu", "fp32", width=64)
    assert torch.get_float32_matmul_precision() == "highest"
    set_matmul_precision("cpu", "fp32")
    product = torch.nn.functional.linear(a, b)
    product.sum().backward()
    for found, expected in ((product, exact[0] @ exact[1].T), (a.grad, exact[1].sum(dim=0).expand(m, k)),
                            (b.grad, exact[0].sum(dim=0).expand(n, k)),
                            (a.view(1, m, k) @ b.T, (exact[0] @ exact[1].T)[None])):
        assert (found.double() - expected).norm() < 2e-6 * expected.norm()


def test_onednn_is_not_used_where_it_rounds_to_bfloat16(monkeypatch):
    is_onednn_exact.cache_clear()
    product = torch.Tensor.__matmul__

    def round_if_allowed(a, b):
        if a.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
            a, b = (x.bfloat16().float() for x in (a, b))  # a product in bfloat16 is slow on processors without it
        return product(a, b)
    monkeypatch.setattr(torch.Tensor, "__matmul__", round_if_allowed)
    set_matmul_precision("cpu", "fp32")
    assert torch.get_float32_matmul_precision() == "highest"
    is_onednn_exact.cache_clear()


def half_precision_gradients(cast, compiled=False, checkpointing=False):
    """Loss and gradients of two micro-batches in bfloat16, with and without cast_weights."""
    torch.manual_seed(0)
    backbone = VisionTransformer(32, 8, embed_dim=32, depth=3, num_heads=2)
    network = MultiCropWrapper(backbone, DINOHead(32, 16, hidden_dim=8))
    network.backbone.activation_checkpointing = checkpointing
    if compiled:
        compile_blocks(network.backbone)
    crops = [torch.randn(2, 3, side, side) for side in (32, 32, 16)]
    with cast_weights(network, "bf16") if cast else contextlib.nullcontext():
        for _ in range(2):
            with autocast("cpu", "bf16"):
                logits = network(crops)
            logits.square().sum().backward()
    assert all("weight" not in vars(module) for module in network.modules())
    return {"logits": logits.detach()} | {name: p.grad for name, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("flags", [
    {}, {"checkpointing": True}, pytest.param({"compiled": True}, marks=pytest.mark.slow)], ids=str)
def test_cast_weights_computes_what_autocast_computes(flags):
    expected, found = half_precision_gradients(False, **flags), half_precision_gradients(True, **flags)
    assert found.keys() == expected.keys() and all(x.dtype == torch.float32 for x in found.values())
    for name, value in expected.items():  # autocast sums the patch embedding's gradients of two crop sizes in float32
        rtol = 2**-7 if name.endswith("patch_embed.proj.weight") else 0
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol * value.abs().max().item(), msg=name)


def test_cast_weights_of_convolutions_computes_what_autocast_computes():
    images, gradients = torch.randn(2, 3, 32, 32), []
    for context in (lambda network: contextlib.nullcontext(), lambda network: cast_weights(network, "bf16")):
        torch.manual_seed(0)
        network = build_backbone(dict(arch="shufflenet_v2_x0_5", img_size=32)).train()
        with context(network), autocast("cpu", "bf16"):
            network(images).float().square().sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


def test_cast_weights_leaves_parameters_alone():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    before = [(name, p, p.clone()) for name, p in network.named_parameters()]
    with cast_weights(network, "fp16"):
        assert network[0].weight.dtype == network[2].bias.dtype == torch.float16
        assert network[1].weight.dtype == torch.float32
        after = list(network.named_parameters())
        assert all(p is q and torch.equal(p, copy) for (_, p, copy), (_, q) in zip(before, after, strict=True))
        assert all(tensor.dtype == torch.float32 for tensor in network.state_dict().values())
    with cast_weights(network, "fp32"):
        assert network[2].weight is before[4][1]
