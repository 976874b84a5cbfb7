"""Vision transformer (ViT), the backbone: images in, CLS features, patch tokens and attention maps out.

    model = vit_small(patch_size=16)
    feature = model(images)                                      # [B, 3, H, W] -> [B, 384]
    feature, attention = model.forward_with_attention(images)    # attention [B, 6, N]

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", in the form that DINO uses: a CLS token, no classifier,
LayerNorm eps 1e-6, bias on q, k and v. State-dict names and outputs equal those of the released DINO models, so their
weights load unchanged (not with a convolutional stem). Needs torch only.

Shapes: B images of C channels and H x W pixels, patches of p x p pixels, N = H/p * W/p patches, width D.
"""

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SIZES = {
    "vit_tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "vit_small": dict(embed_dim=384, depth=12, num_heads=6),
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12),
    "vit_large": dict(embed_dim=1024, depth=24, num_heads=16),
}


class Attention(nn.Module):
    """Multi-head self-attention, fused where that is faster; attention maps are computed on request only."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x):
        """[B, 1+N, D] -> q, k, v, each [B, heads, 1+N, D/heads]."""
        B, N, D = x.shape
        return self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x, queries=None):
        """[B, 1+N, D] -> [B, queries, D]: the outputs of the first `queries` tokens, None for all."""
        q, k, v = self.split_heads(x)
        # On a CPU, in half precision, the fused kernel is slower in backward; from 300 tokens on it saves much memory.
        # On Hopper GPUs cuDNN's, for a single query, gives NaN gradients.
        is_slow = q.device.type == "cpu" and q.dtype != torch.float32 and q.shape[2] < 300 and torch.is_grad_enabled()
        if queries or is_slow:
            x = attention_weights(q[:, :, :queries], k) @ v  # [B, heads, queries, D/heads]
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))

    def attention_map(self, x, queries=None):
        """[B, 1+N, D] -> attention of the first `queries` tokens, [B, heads, queries, 1+N]; each row sums to 1."""
        q, k, _ = self.split_heads(x)
        return attention_weights(q[:, :, :queries], k)


def attention_weights(q, k):
    """Queries [B, heads, Q, d] and keys [B, heads, 1+N, d] -> [B, heads, Q, 1+N]; each row sums to 1."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each on a residual branch."""

    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden_dim = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, hidden_dim), act=nn.GELU(), fc2=nn.Linear(hidden_dim, dim)))

    def forward(self, x, queries=None, keep=None):
        """[B, 1+N, D] -> [B, queries, D]: the first `queries` tokens, None for all.

        Args:
            keep: [2, B, 1, 1], factors of the two branches for each sample (stochastic depth).
        """
        branch, x = self.attn(self.norm1(x), queries), x[:, :queries]
        x = x + (branch if keep is None else branch * keep[0])
        branch = self.mlp(self.norm2(x))
        return x + (branch if keep is None else branch * keep[1])


def build_conv_stem(in_chans, dim, patch_size):
    """log2(p) convolutions of stride 2, with batch norm and ReLU: [B, C, H, W] -> [B, D, H/p, W/p].

    Xiao et al. 2021, "Early Convolutions Help Transformers See Better", who leave out a block in exchange.
    """
    widths = [math.ceil(dim * 2**i / patch_size) for i in range(1, patch_size.bit_length())]  # D/4, D/2, D for p = 8
    return nn.Sequential(*(nn.Sequential(OrderedDict(
        conv=nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1, bias=False), norm=nn.BatchNorm2d(after),
        act=nn.ReLU())) for before, after in itertools.pairwise([in_chans, *widths])))


class VisionTransformer(nn.Module):
    """Vision transformer with a CLS token and a learned position embedding.

    Args:
        img_size: side of the training images, pixels. The position embedding is interpolated for other sizes, also
            for non-square ones.
        patch_size: pixels; height and width of every input must be multiples of it.
        drop_path_rate: stochastic depth in training: probability, per sample, of dropping a branch of the last block;
            it rises linearly from 0 in the first (Huang et al. 2016, section 3).
        conv_stem: `build_conv_stem` before the linear layer that embeds patches. Its batch norm needs eval mode for
            inference; a teacher stays in train mode, with statistics of its own; DDP wants nn.SyncBatchNorm.

    Raises:
        ValueError: img_size is not a multiple of patch_size, or embed_dim not of num_heads; or a convolutional stem for
            a patch_size that is not 2, 4, 8 ...
    """

    def __init__(self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 384,
                 depth: int = 12, num_heads: int = 6, mlp_ratio: float = 4.0, drop_path_rate: float = 0.0,
                 conv_stem: bool = False):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        if conv_stem and (patch_size < 2 or patch_size & (patch_size - 1)):
            raise ValueError(f"a convolutional stem needs a patch_size of 2, 4, 8 ..., not {patch_size}")
        self.patch_size, self.in_chans, self.embed_dim, self.num_heads = patch_size, in_chans, embed_dim, num_heads
        self.drop_path_rate = drop_path_rate
        self.activation_checkpointing = False  # recompute all blocks but the last in backward, to save memory
        self.grid = (img_size // patch_size, img_size // patch_size)  # rows and columns of pos_embed
        self.conv_stem = conv_stem
        self.patch_embed = nn.Sequential(OrderedDict(
            stem=build_conv_stem(in_chans, embed_dim, patch_size), proj=nn.Conv2d(embed_dim, embed_dim, 1)
        ) if conv_stem else OrderedDict(proj=nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.init_weights()

    def init_weights(self):
        """Truncated normal of standard deviation 0.02 for linear layers and embeddings, zero biases."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> CLS feature [B, D]; the last block computes the CLS token only."""
        x = self.prepare_tokens(x)
        keeps = self.sample_stochastic_depth(x)
        for block, keep in zip(self.blocks[:-1], keeps):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, None, keep, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, None, keep)
        return self.norm(self.blocks[-1](x, 1, keeps[-1])[:, 0])

    def forward_with_attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] -> CLS feature [B, D], and the last block's attention from CLS to patches [B, heads, N].

        Each row sums to 1 minus the attention from CLS to itself. Patches are in row-major order: reshape to
        [B, heads, H/p, W/p] for a map.
        """
        x, last = self.run_to_last_block(x), self.blocks[-1]
        attention = last.attn.attention_map(last.norm1(x), queries=1)  # [B, heads, 1, 1+N]
        return self.norm(last(x, queries=1)[:, 0]), attention[:, :, 0, 1:]

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> all of the last block's attention, [B, heads, 1+N, 1+N]; token 0 is CLS."""
        x, last = self.run_to_last_block(x), self.blocks[-1]
        return last.attn.attention_map(last.norm1(x))

    def get_intermediate_layers(self, x: Tensor, n: int | Sequence[int] = 1, reshape: bool = False,
                                return_class_token: bool | None = None,
                                norm: bool = True) -> list[Tensor] | list[tuple[Tensor, Tensor]]:
        """Images [B, C, H, W] -> tokens [B, 1+N, D] of each of the last n blocks; token 0 is CLS, as in DINO.

        With `reshape` or `return_class_token`, patches and CLS token are apart, as in DINOv2.

        Args:
            n: number of last blocks, or the indices of blocks, whose layers are returned in the order of the blocks.
            reshape: feature maps [B, D, H/p, W/p] of the patches in place of patch tokens [B, N, D].
            return_class_token: True: a pair of patches and CLS token [B, D] for each block; False: patches only.
            norm: apply the final LayerNorm, to every layer.

        Raises:
            ValueError: the model has no such blocks.
        """
        depth = len(self.blocks)
        taken = range(depth - n, depth) if isinstance(n, int) else n
        if not len(taken) or not all(0 <= i < depth for i in taken):
            raise ValueError(f"n is {n}, expected 1 to the number of blocks, {depth}, or indices below it")
        height, width = x.shape[-2:]
        x, layers = self.prepare_tokens(x), []
        for i, block in enumerate(self.blocks[:max(taken) + 1]):
            x = block(x)
            if i in taken:
                layers.append(self.norm(x) if norm else x)
        if return_class_token is None and not reshape:
            return layers
        patches = [x[:, 1:] for x in layers]
        if reshape:
            grid = height // self.patch_size, width // self.patch_size
            patches = [x.transpose(1, 2).unflatten(2, grid).contiguous() for x in patches]
        return [(x, layer[:, 0]) for x, layer in zip(patches, layers)] if return_class_token else patches

    def run_to_last_block(self, x):
        """Images [B, C, H, W] -> tokens [B, 1+N, D] that enter the last block, without stochastic depth."""
        x = self.prepare_tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return x

    def sample_stochastic_depth(self, x):
        """Factors of the branches, [depth, 2, B, 1, 1]: 0, or 1 / (1 - rate) to keep the mean; None for each in eval.

        They are drawn before the blocks run, so that recomputing a block draws nothing.
        """
        depth = len(self.blocks)
        if not self.training or self.drop_path_rate == 0:
            return [None] * depth
        keep = 1 - torch.linspace(0, self.drop_path_rate, depth, device=x.device).view(depth, 1, 1, 1, 1)
        return torch.bernoulli(keep.expand(depth, 2, len(x), 1, 1)) / keep

    def prepare_tokens(self, x):
        """Images [B, C, H, W] -> CLS and patch tokens with position embedding, [B, 1+N, D]."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"images of shape {list(x.shape)}, expected [B, {self.in_chans}, H, W]")
        B, _, H, W = x.shape
        if H % self.patch_size or W % self.patch_size:
            raise ValueError(f"image size {H}x{W} is not a multiple of patch_size {self.patch_size}")
        patches = self.embed_patches(x)  # [B, N, D]
        tokens = torch.cat((self.cls_token.expand(B, -1, -1), patches), dim=1)
        return tokens + self.interpolate_pos_encoding(H // self.patch_size, W // self.patch_size)

    def embed_patches(self, x):
        """Images [B, C, H, W] -> patch embeddings [B, N, D]."""
        if self.conv_stem:  # with channels last convolutions take less time, and the permutation none
            maps = self.patch_embed.stem(x.contiguous(memory_format=torch.channels_last))
            patches = maps.permute(0, 2, 3, 1)  # [B, H/p, W/p, D]
        else:
            p = self.patch_size
            pixels = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, C, H/p, p, W/p, p]
            patches = pixels.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [B, H/p, W/p, C*p*p]
        # A convolution with a large kernel is slow on GPUs in half precision; of a 1x1 kernel with channels last the
        # gradient would have another layout than the weight, of which DDP warns.
        proj = self.patch_embed.proj
        return F.linear(patches.flatten(1, 2), proj.weight.flatten(1), proj.bias)

    def interpolate_pos_encoding(self, rows: int, cols: int) -> Tensor:
        """Position embedding for a grid of rows x cols patches, [1, 1 + rows*cols, D]; bicubic, not antialiased."""
        if (rows, cols) == self.grid:
            return self.pos_embed
        interpolate_offset = 0.1  # the released weights were evaluated with it; without it every feature shifts
        scale = [(side + interpolate_offset) / trained for side, trained in zip((rows, cols), self.grid)]
        patches = self.pos_embed[:, 1:].unflatten(1, self.grid).permute(0, 3, 1, 2)  # [1, D, rows, cols]
        patches = F.interpolate(patches.float(), scale_factor=scale, mode="bicubic").flatten(2).transpose(1, 2)
        return torch.cat((self.pos_embed[:, :1], patches.to(self.pos_embed.dtype)), dim=1)


def vit_tiny(patch_size: int = 16, **kwargs) -> VisionTransformer:
    """ViT-Ti: 5.5 M parameters, width 192."""
    return VisionTransformer(patch_size=patch_size, **(SIZES["vit_tiny"] | kwargs))


def vit_small(patch_size: int = 16, **kwargs) -> VisionTransformer:
    """ViT-S: 21.7 M parameters, width 384, the paper's main model."""
    return VisionTransformer(patch_size=patch_size, **(SIZES["vit_small"] | kwargs))


def vit_base(patch_size: int = 16, **kwargs) -> VisionTransformer:
    """ViT-B: 85.8 M parameters, width 768."""
    return VisionTransformer(patch_size=patch_size, **(SIZES["vit_base"] | kwargs))


def vit_large(patch_size: int = 16, **kwargs) -> VisionTransformer:
    """ViT-L: 303.3 M parameters, width 1024, not in the paper."""
    return VisionTransformer(patch_size=patch_size, **(SIZES["vit_large"] | kwargs))
