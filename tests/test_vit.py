import pytest
import timm
import torch
import torch.nn.functional as F
from torchvision.models.vision_transformer import ConvStemConfig
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from vit import SIZES, VisionTransformer, vit_base, vit_large, vit_small, vit_tiny

GOLDEN_SIZES = [("vit_p16", 224, 16, size) for size in ("224x224", "96x96", "160x224", "480x320")] + [
    ("vit_p8", 96, 8, size) for size in ("96x96", "224x224", "64x48")]


@pytest.mark.parametrize("name, img_size, patch_size, size", GOLDEN_SIZES)
def test_outputs_equal_the_reference_at_every_size(golden, image, name, img_size, patch_size, size):
    model = VisionTransformer(img_size, patch_size, embed_dim=48, depth=3, num_heads=3)
    model.load_state_dict(golden(f"{name}_weights"))  # strict: the names are the reference's
    outputs = golden(f"{name}_outputs")
    expected = {key.partition(".")[2]: value for key, value in outputs.items() if key.startswith(size + ".")}
    x = image(2, *map(int, size.split("x")))
    with torch.no_grad():
        tokens = model.get_intermediate_layers(x, n=2)
        feature, cls_attention = model.forward_with_attention(x)
        attention = model.get_last_selfattention(x)

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)

    close(model(x), expected["cls"])
    close(feature, expected["cls"])
    close(tokens[1][:, 0], expected["cls"])
    close(tokens[0][:, 0], expected["layer_minus2_cls"])
    close(tokens[1][:, 1:].mean(dim=1), expected["patch_tokens_mean"])
    close(attention[:, :, 0], expected["cls_attention"])
    close(cls_attention, expected["cls_attention"][:, :, 1:])
    if "patch_tokens" in expected:
        close(tokens[1][:, 1:], expected["patch_tokens"])


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("n", [2, [3, 0]])
def test_layers_called_as_in_dinov2_equal_timm(n, norm):
    """Feature maps, patch tokens and CLS tokens of images that are not square, of the last and of chosen blocks."""
    torch.manual_seed(0)
    ours, x = vit_tiny(depth=4), torch.randn(2, 3, 48, 80)
    theirs = timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=0, img_size=(48, 80))
    theirs.load_state_dict(ours.state_dict() | {"pos_embed": ours.interpolate_pos_encoding(3, 5)})
    maps, patches = (theirs.forward_intermediates(x, n, return_prefix_tokens=True, norm=norm, intermediates_only=True,
                                                  output_fmt=layout) for layout in ("NCHW", "NLC"))
    assert len(maps) == 2 and maps[0][0].shape == (2, 192, 3, 5)
    pairs = ours.get_intermediate_layers(x, n, reshape=True, return_class_token=True, norm=norm)
    for (a, cls), b, c, tokens, (feature_map, _), (patch_tokens, their_cls) in zip(
            pairs, ours.get_intermediate_layers(x, n, reshape=True, norm=norm),
            ours.get_intermediate_layers(x, n, return_class_token=False, norm=norm),
            ours.get_intermediate_layers(x, n, norm=norm), maps, patches, strict=True):
        torch.testing.assert_close(a, feature_map, rtol=0, atol=1e-5)
        torch.testing.assert_close(c, patch_tokens, rtol=0, atol=1e-5)
        torch.testing.assert_close(cls, their_cls[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(b, a, rtol=0, atol=0)
        torch.testing.assert_close(tokens, torch.cat((cls[:, None], c), dim=1), rtol=0, atol=0)


@pytest.mark.parametrize("patch_size, widths", [(2, [48]), (8, [12, 24, 48]), (16, [6, 12, 24, 48])])
def test_convolutional_stem_equals_torchvision(patch_size, widths):
    """In training and with running statistics; the order of the layers is the same."""
    torch.manual_seed(0)
    ours = VisionTransformer(32, patch_size, embed_dim=48, depth=1, num_heads=3, conv_stem=True)
    theirs = TorchvisionViT(32, patch_size, num_layers=1, num_heads=3, hidden_dim=48, mlp_dim=48, conv_stem_configs=[
        ConvStemConfig(width, kernel_size=3, stride=2) for width in widths]).conv_proj
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.patch_embed.state_dict().values(), strict=True)))
    assert ours.patch_embed.proj.weight.std() > 0.05  # not of the standard deviation of linear layers, 0.02
    for training in (True, True, False):
        x = torch.randn(4, 3, 64, 32)
        patches, expected = ours.train(training).embed_patches(x), theirs.train(training)(x)
        torch.testing.assert_close(patches, expected.flatten(2).mT, rtol=0, atol=1e-5)
    feature, attention = ours.forward_with_attention(x)
    torch.testing.assert_close(ours(x), feature)
    assert feature.shape == (4, 48) and attention.shape == (4, 3, 64 * 32 // patch_size**2)


def test_gradients_of_the_convolutional_stem_have_the_layout_of_its_weights():
    """DistributedDataParallel warns of another and copies them."""
    model = VisionTransformer(32, 8, embed_dim=128, depth=1, num_heads=2, conv_stem=True)
    model(torch.randn(64, 3, 32, 32)).sum().backward()
    for name, p in model.patch_embed.named_parameters():
        assert p.grad.stride() == p.stride(), name


@pytest.mark.parametrize("patch_size", [1, 6, 14])
def test_convolutional_stem_needs_a_power_of_two(patch_size):
    with pytest.raises(ValueError, match=f"needs a patch_size of 2, 4, 8 ..., not {patch_size}"):
        VisionTransformer(84, patch_size, embed_dim=48, depth=1, num_heads=3, conv_stem=True)


@pytest.mark.parametrize("build, theirs", [(vit_tiny, "vit_tiny_patch16_224"), (vit_small, "vit_small_patch16_224"),
                                           (vit_base, "vit_base_patch16_224"), (vit_large, "vit_large_patch16_224")])
def test_state_dict_shapes_equal_timm(build, theirs):
    with torch.device("meta"):
        ours, theirs = build(), timm.create_model(theirs, num_classes=0)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_outputs_and_gradients_equal_timm():
    torch.manual_seed(0)
    ours, theirs = vit_tiny(depth=2), timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 224, 224)
    a, b = ours(x), theirs(x)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    a.square().sum().backward()
    b.square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_bfloat16_at_an_interpolated_size():
    model = VisionTransformer(32, 8, embed_dim=16, depth=1, num_heads=2).bfloat16()
    assert model(torch.zeros(1, 3, 40, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_initialization_has_std_0_02_and_zero_biases():
    torch.manual_seed(0)
    model = vit_tiny()
    assert abs(model.blocks[5].mlp.fc1.weight.std().item() - 0.02) < 1e-3
    assert abs(model.pos_embed.std().item() - 0.02) < 1e-3
    assert model.blocks[5].attn.qkv.bias.abs().max() == 0


def test_stochastic_depth_rate_rises_linearly_and_keeps_the_mean():
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, embed_dim=16, depth=4, num_heads=2, drop_path_rate=0.3).train()
    keep = model.sample_stochastic_depth(torch.empty(20_000, 1, 1))
    assert keep.shape == (4, 2, 20_000, 1, 1)
    for block, rate in zip(keep, (0.0, 0.1, 0.2, 0.3)):
        assert block.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)][rate == 0:])
        assert (block == 0).float().mean().item() == pytest.approx(rate, abs=0.01)
        assert ((block[0] == 0) & (block[1] == 0)).float().mean().item() == pytest.approx(rate**2, abs=0.01)


def test_dropped_branches_do_not_contribute():
    torch.manual_seed(0)
    block = VisionTransformer(32, 8, embed_dim=16, depth=1, num_heads=2).blocks[0]
    x = torch.randn(3, 5, 16)
    expected, keep = block(x), torch.ones(2, 3, 1, 1)
    torch.testing.assert_close(block(x, keep=keep), expected)
    keep[:, 1] = 0
    torch.testing.assert_close(block(x, keep=keep)[1], x[1], rtol=0, atol=0)
    torch.testing.assert_close(block(x, keep=keep)[::2], expected[::2])
    keep[0, 2], keep[1, 2] = 0, 2
    torch.testing.assert_close(block(x, keep=keep)[2], (x + 2 * block.mlp(block.norm2(x)))[2])


def test_no_stochastic_depth_in_eval_mode_or_attention():
    model = VisionTransformer(32, 8, embed_dim=16, depth=4, num_heads=2, drop_path_rate=0.9)
    x = torch.randn(8, 3, 32, 32)
    expected = model.eval()(x)
    assert not torch.allclose(model.train()(x), expected)
    torch.testing.assert_close(model.forward_with_attention(x)[0], expected)
    torch.testing.assert_close(model.get_intermediate_layers(x)[0][:, 0], expected)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow), "checkpointed"])
def test_compiled_and_checkpointed_equal_eager(mode, precision):
    results = []
    for changed in (False, True):
        torch.manual_seed(0)
        model = VisionTransformer(32, 8, embed_dim=32, depth=3, num_heads=2, drop_path_rate=0.5).train()
        model.activation_checkpointing = changed and mode == "checkpointed"
        for block in model.blocks if changed and mode != "checkpointed" else ():
            block.compile(dynamic=False, backend=mode)
        x = torch.randn(8, 3, 32, 32)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            feature = model(x)
        (feature.float() @ torch.linspace(-1, 1, 32)).sum().backward()
        results.append([feature, *(p.grad for p in model.parameters())])
    exact = mode == "checkpointed"
    for a, b in zip(*results):
        bound = 0 if exact else (1e-5 if precision == torch.float32 else 0.02) * a.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=bound)


@pytest.mark.parametrize("tokens, precision, grad, fused", [
    (197, torch.bfloat16, True, False), (300, torch.bfloat16, True, True), (197, torch.bfloat16, False, True),
    (197, torch.float32, True, True)])
def test_attention_is_fused_where_that_is_faster_or_saves_memory(monkeypatch, tokens, precision, grad, fused):
    calls, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: calls.append(1) or attend(*qkv))
    attention = VisionTransformer(32, 8, embed_dim=16, depth=1, num_heads=2).blocks[0].attn
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16), torch.set_grad_enabled(grad):
        attention(torch.zeros(1, tokens, 16))
    assert bool(calls) == fused


@pytest.mark.parametrize("queries", [None, 1])
def test_unfused_attention_on_cpu_equals_fused(queries):
    """In bfloat16 on a CPU, attention with gradients over fewer than 300 tokens is not fused."""
    torch.manual_seed(0)
    attention = VisionTransformer(32, 8, embed_dim=64, depth=1, num_heads=2).blocks[0].attn
    x = torch.randn(3, 20, 64)
    expected = attention(x, queries)
    with torch.autocast("cpu", torch.bfloat16):
        unfused = attention(x, queries)
        with torch.no_grad():
            fused = attention(x, queries)
    for y in (unfused, fused):
        torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.01 * expected.abs().max().item())


def test_output_shapes_for_other_channels_and_sizes():
    model = VisionTransformer(img_size=32, patch_size=8, in_chans=5, embed_dim=16, depth=1, num_heads=2)
    feature, attention = model.forward_with_attention(torch.randn(2, 5, 40, 24))
    assert feature.shape == (2, 16) and attention.shape == (2, 2, 15)
    assert SIZES["vit_small"]["embed_dim"] == 384


@pytest.mark.parametrize("call, message", [
    (lambda: VisionTransformer(img_size=100, patch_size=16), "100.*16"),
    (lambda: VisionTransformer(embed_dim=100, num_heads=6), "100.*6"),
    (lambda: VisionTransformer(32, 8, embed_dim=16, depth=1, num_heads=2)(torch.zeros(1, 3, 30, 32)), "30x32.*8"),
    (lambda: VisionTransformer(32, 8, embed_dim=16, depth=1, num_heads=2).get_intermediate_layers(None, 2), "n is 2"),
    (lambda: VisionTransformer(32, 8, embed_dim=16, depth=1, num_heads=2).get_intermediate_layers(None, [0, -1]),
     r"n is \[0, -1\]"),
    (lambda: VisionTransformer(32, 8, embed_dim=16, depth=1, num_heads=2)(torch.zeros(3, 32, 32)),
     r"\[3, 32, 32\], expected \[B, 3, H, W\]"),
    (lambda: VisionTransformer(32, 8, embed_dim=16, depth=1, num_heads=2)(torch.zeros(2, 1, 32, 32)),
     r"\[2, 1, 32, 32\], expected \[B, 3, H, W\]"),
])
def test_errors_name_the_invalid_sizes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
