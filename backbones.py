"""Any backbone: the vision transformer of vit.py, or a classifier of torchvision or timm without its head.

    backbone = build_backbone(dict(img_size=224, patch_size=16))                 # VisionTransformer
    backbone = build_backbone(dict(arch="resnet50", img_size=224))               # torchvision
    backbone = build_backbone(dict(arch="timm:xcit_small_12_p16_224", img_size=224))
    feature = backbone(images)                                                   # [B, 3, H, W] -> [B, D]

Of a Headless there are features and nothing else: attention and patch tokens are the transformer's. Nothing is
downloaded: weights are random until training or a file sets them.
"""

import difflib

import torch
import torch.distributed as dist
from torch import nn
from torchvision import models
from torchvision.ops import StochasticDepth

from vit import SIZES, VisionTransformer


class BackboneError(ValueError):
    """There is no such backbone, or it cannot take such pictures; the message says which."""


class HeadlessClassifier(nn.Module):
    """A classifier of torchvision or timm without its head: images [B, 3, H, W] -> features [B, D].

    Args:
        arch: a name of torchvision's classifiers, or "timm:" and one of timm's.
        img_size: pixels, the side of the pictures it is mostly shown.
        drop_path_rate: stochastic depth in training, at its most; nothing else in it is drawn at random.

    Raises:
        BackboneError: no such classifier, it gives no features of such pictures, or it has no stochastic depth.
    """

    in_chans, patch_size, blocks = 3, 1, ()  # as of a VisionTransformer: sides are multiples of 1, no blocks are known

    def __init__(self, arch, img_size=224, drop_path_rate=0.0):
        super().__init__()
        check_arch(arch)
        self.arch, self.grid = arch, (img_size, img_size)
        make = from_timm if arch.startswith("timm:") else from_torchvision
        self.model = make(arch, img_size, drop_path_rate)
        self.embed_dim = self.try_size(img_size, img_size)

    def forward(self, x):
        return self.model(x)

    @torch.no_grad()
    def try_size(self, height, width):
        """Show it a picture of so many pixels: the width D of its feature.

        Raises:
            BackboneError: it cannot look at it, or what it gives is no feature.
        """
        if not all(type(side) is int and 0 < side <= 4096 for side in (height, width)):
            raise BackboneError(f"{self.arch}: {height} x {width} pixels are not sides from 1 to 4096")
        training, image = self.training, torch.zeros(1, 3, height, width, device=next(self.parameters()).device)
        self.eval()
        try:
            feature = self.model(image)
        except Exception as error:  # each of them has its own
            raise BackboneError(f"{self.arch} cannot look at {height} x {width} pixels: "
                                f"{' '.join(str(error).split())[:200]}") from None
        finally:
            self.train(training)
        if not isinstance(feature, torch.Tensor) or feature.dim() != 2:
            raise BackboneError(f"{self.arch} gives no feature [B, D] of a picture")
        return feature.shape[1]


def check_arch(arch):
    """Raise BackboneError unless torchvision or timm has a classifier of this name."""
    library, known, prefix, name = "torchvision", models.list_models(module=models), "", arch
    if arch.startswith("timm:"):
        import timm

        library, known, prefix, name = f"timm {timm.__version__}", timm.list_models(), "timm:", arch[5:]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise BackboneError(f"{arch} is none of {', '.join(SIZES)} and no classifier of {library}"
                            + (f", which has {prefix}{close[0]}" if close else ""))


def from_torchvision(arch, img_size, drop_path_rate):
    """A classifier of torchvision with nothing in the place of its last linear layer, and without dropout."""
    flags = dict(aux_logits=False, init_weights=True) if arch in ("googlenet", "inception_v3") else {}
    model = models.get_model(arch, weights=None, **flags)
    heads = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not heads or model.get_submodule(heads[-1]).out_features != 1000:
        raise BackboneError(f"{arch} has no linear classifier at its end that could be taken off")
    parent, _, name = heads[-1].rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())
    depths = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    if drop_path_rate and not depths:
        raise BackboneError(f"{arch} has no stochastic depth: --drop_path_rate must be 0")
    most = max((module.p for module in depths), default=0) or 1
    for module in depths:
        module.p *= drop_path_rate / most
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # of the head, which is gone
            module.p = 0.0
    return model


def from_timm(arch, img_size, drop_path_rate):
    """A model of timm without its classifier, for views of several sizes as far as it can be told to be."""
    import timm

    rate = drop_path_rate or None  # None is as if it were not there
    for flags in (dict(img_size=img_size, dynamic_img_size=True), dict(img_size=img_size), {}):
        try:
            return timm.create_model(arch.removeprefix("timm:"), num_classes=0, drop_path_rate=rate, **flags)
        except TypeError as error:  # a flag that this model does not have
            reason = str(error)
        except (ValueError, RuntimeError, AssertionError) as error:  # a size that it cannot have
            raise BackboneError(f"{arch} cannot be built for {img_size} pixels: {error}") from None
    raise BackboneError(f"{arch} cannot be built: {reason}")


def convert_sync_batchnorm(network):
    """A network whose backbone's batch norm, and its own, is over the pictures of all GPUs."""
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    if getattr(network.backbone, "arch", "").startswith("timm:"):  # whose layers hold their activation too
        from timm.layers import convert_sync_batchnorm as convert
    return convert(network)


def broadcast_buffers(network):
    """Give all processes what batch norm of process 0 has gathered: on the CPU each has seen pictures of its own."""
    if dist.is_available() and dist.is_initialized():
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def build_backbone(arguments, drop_path_rate=0.0):
    """Headless from arguments that name an "arch", VisionTransformer from others."""
    kind = HeadlessClassifier if "arch" in arguments else VisionTransformer
    return kind(**arguments, drop_path_rate=drop_path_rate)


if __name__ == "__main__":
    for arch in ("resnet18", "mobilenet_v3_small", "convnext_tiny"):
        backbone = HeadlessClassifier(arch, 64)
        parameters = sum(p.numel() for p in backbone.parameters())
        print(f"{arch}: {parameters / 1e6:.1f} M parameters, [2, 3, 64, 64] -> "
              f"{list(backbone(torch.rand(2, 3, 64, 64)).shape)}")
