"""The backbone: a vision transformer, image in, feature out.

    model = vit_small(patch_size=16)
    feature = model(images)                                      # [B, 3, H, W] -> [B, 384]
    feature, attention = model.forward_with_attention(images)    # attention [B, 6, N]

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", in the form DINO uses: a CLS token, no
classifier, LayerNorm eps 1e-6, bias on q, k and v. Parameter names and outputs equal those of the
released DINO models, so their weights load unchanged. This file needs torch and nothing else.

Shapes in this file: B images, H x W pixels, N = H/p * W/p patches, D width.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

SIZES = {  # name -> what differs between the models
    "vit_tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "vit_small": dict(embed_dim=384, depth=12, num_heads=6),
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12),
    "vit_large": dict(embed_dim=1024, depth=24, num_heads=16),
}


class Attention(nn.Module):
    """Multi-head self-attention, always through the fused kernel; maps are made only on request."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x):
        """[B, 1+N, D] -> q, k, v, each [B, heads, 1+N, D/heads]."""
        B, N, D = x.shape
        return self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x, queries=None):
        """[B, 1+N, D] -> [B, queries, D]: what the first `queries` tokens gather from all of them."""
        q, k, v = self.heads(x)
        # On a CPU, in half precision and for few tokens, the fused kernel's backward is four times slower than the
        # plain products are.
        plain = q.device.type == "cpu" and q.dtype != torch.float32 and q.shape[2] < 128 and torch.is_grad_enabled()
        with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
            x = F.scaled_dot_product_attention(q[:, :, :queries], k, v)  # [B, heads, queries, D/heads]
        return self.proj(x.transpose(1, 2).flatten(2))

    def attention_map(self, x, queries=None):
        """[B, 1+N, D] -> the softmax itself, [B, heads, queries, 1+N]; each row sums to 1."""
        q, k, _ = self.heads(x)
        scale = q.shape[-1] ** -0.5
        return ((q[:, :, :queries] * scale) @ k.transpose(-2, -1)).softmax(dim=-1)


class Mlp(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each on a residual branch."""

    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x, queries=None, keep=None):
        """[B, 1+N, D] -> [B, queries, D]; `queries` None means every token.

        Args:
            keep: [2, B, 1, 1], factors of the two branches for each sample (stochastic depth).
        """
        branch, x = self.attn(self.norm1(x), queries), x[:, :queries]
        x = x + branch if keep is None else torch.addcmul(x, branch, keep[0])
        branch = self.mlp(self.norm2(x))
        return x + branch if keep is None else torch.addcmul(x, branch, keep[1])


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):  # [B, C, H, W] -> [B, N, D]
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Vision transformer with a CLS token and learned positions.

    Args:
        img_size: pixels, the square size the position embedding is made for. Other sizes, also
            non-square ones, are resampled from it.
        patch_size: pixels; H and W of every input must be divisible by it.
        drop_path_rate: stochastic depth in training: how often the last block's branches are dropped, for
            each sample by itself; the earlier blocks rise to it linearly (Huang et al. 2016, section 3).

    Raises:
        ValueError: a size that the patch does not divide, or a width that the heads do not divide.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=384, depth=12, num_heads=6,
                 mlp_ratio=4.0, drop_path_rate=0.0):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not divisible by patch_size {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
        self.patch_size, self.in_chans, self.embed_dim, self.num_heads = patch_size, in_chans, embed_dim, num_heads
        self.grid = (img_size // patch_size, img_size // patch_size)  # rows and columns of pos_embed
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        self.drop_path_rate = drop_path_rate
        self.activation_checkpointing = False  # compute blocks again in backward, instead of keeping what is in them
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.init_weights()

    def init_weights(self):
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        """Images [B, C, H, W] -> the CLS feature [B, D].

        Only the CLS token leaves the last block, so only its row is computed there.
        """
        x = self.prepare_tokens(x)
        keeps = self.stochastic_depth(x)
        for block, keep in zip(self.blocks[:-1], keeps):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, None, keep, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, None, keep)
        return self.norm(self.blocks[-1](x, 1, keeps[-1])[:, 0])

    def stochastic_depth(self, x):
        """What each block keeps of each sample: [depth, 2, B, 1, 1], 0 or 1 / (1 - rate), so the mean stays 1.

        A list of None where nothing is dropped. All is drawn at once: blocks draw nothing.
        """
        depth = len(self.blocks)
        if not self.training or self.drop_path_rate == 0:
            return [None] * depth
        keep = 1 - torch.linspace(0, self.drop_path_rate, depth, device=x.device).view(depth, 1, 1, 1, 1)
        return torch.bernoulli(keep.expand(depth, 2, len(x), 1, 1)) / keep

    def forward_with_attention(self, x):
        """Images -> feature [B, D] and the last block's attention of CLS over patches [B, heads, N].

        Each row sums to 1 minus what CLS gives to itself. N runs over rows first: reshape to
        [B, heads, H/p, W/p] to draw it.
        """
        x = self.run_blocks(x, self.blocks[:-1])
        last = self.blocks[-1]
        attention = last.attn.attention_map(last.norm1(x), queries=1)  # [B, heads, 1, 1+N]
        return self.norm(last(x, queries=1)[:, 0]), attention[:, :, 0, 1:]

    def get_last_selfattention(self, x):
        """Images -> all of the last block's attention, [B, heads, 1+N, 1+N]; token 0 is CLS."""
        x = self.run_blocks(x, self.blocks[:-1])
        last = self.blocks[-1]
        return last.attn.attention_map(last.norm1(x))

    def get_intermediate_layers(self, x, n=1):
        """Images -> the tokens after each of the last n blocks, a list of [B, 1+N, D], final norm applied."""
        if not 1 <= n <= len(self.blocks):
            raise ValueError(f"n is {n}, expected 1 to the number of blocks, {len(self.blocks)}")
        first = len(self.blocks) - n
        x = self.run_blocks(x, self.blocks[:first])
        layers = []
        for block in self.blocks[first:]:
            x = block(x)
            layers.append(self.norm(x))
        return layers

    def run_blocks(self, x, blocks):
        """Images [B, C, H, W] -> tokens [B, 1+N, D] after the given leading blocks, nothing dropped."""
        x = self.prepare_tokens(x)
        for block in blocks:
            x = block(x)
        return x

    def prepare_tokens(self, x):
        """Images [B, C, H, W] -> CLS and patch tokens with their positions, [B, 1+N, D]."""
        B, C, H, W = x.shape
        if H % self.patch_size or W % self.patch_size:
            raise ValueError(f"image of {H}x{W} pixels: height and width must be multiples of patch_size "
                             f"{self.patch_size}")
        tokens = torch.cat((self.cls_token.expand(B, -1, -1), self.patch_embed(x)), dim=1)
        return tokens + self.interpolate_pos_encoding(H // self.patch_size, W // self.patch_size)

    def interpolate_pos_encoding(self, rows, cols):
        """Position embedding for a grid of rows x cols patches, [1, 1 + rows*cols, D].

        Bicubic without antialiasing. The released weights were evaluated with 0.1 added to the target
        size when the scale is computed; leaving it out shifts every feature.
        """
        if (rows, cols) == self.grid:
            return self.pos_embed
        interpolate_offset = 0.1
        grid_rows, grid_cols = self.grid
        patches = self.pos_embed[:, 1:].unflatten(1, self.grid).permute(0, 3, 1, 2)  # [1, D, rows, cols]
        patches = F.interpolate(
            patches.float(), mode="bicubic",
            scale_factor=((rows + interpolate_offset) / grid_rows, (cols + interpolate_offset) / grid_cols))
        patches = patches.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)
        return torch.cat((self.pos_embed[:, :1], patches), dim=1)


def vit_tiny(patch_size=16, **kwargs):
    """5.5 M parameters, width 192."""
    return VisionTransformer(patch_size=patch_size, **(SIZES["vit_tiny"] | kwargs))


def vit_small(patch_size=16, **kwargs):
    """21.7 M parameters, width 384: the paper's main model."""
    return VisionTransformer(patch_size=patch_size, **(SIZES["vit_small"] | kwargs))


def vit_base(patch_size=16, **kwargs):
    """85.8 M parameters, width 768."""
    return VisionTransformer(patch_size=patch_size, **(SIZES["vit_base"] | kwargs))


def vit_large(patch_size=16, **kwargs):
    """303.3 M parameters, width 1024; not in the paper."""
    return VisionTransformer(patch_size=patch_size, **(SIZES["vit_large"] | kwargs))


if __name__ == "__main__":
    for name, size in SIZES.items():
        with torch.device("meta"):
            model = VisionTransformer(**size)
            feature, attention = model.forward_with_attention(torch.empty(2, 3, 480, 320))
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{name}/16  {parameters / 1e6:6.1f} M parameters  [2, 3, 480, 320] -> feature {list(feature.shape)}, "
              f"attention {list(attention.shape)}")
