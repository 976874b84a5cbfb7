"""Backbones: the ViT of vit.py, or a torchvision or timm classifier without its head.

    backbone = build_backbone(dict(img_size=224, patch_size=16))                 # VisionTransformer
    backbone = build_backbone(dict(arch="resnet50", img_size=224))               # torchvision
    backbone = build_backbone(dict(arch="timm:xcit_small_12_p16_224", img_size=224))
    feature = backbone(images)                                                   # [B, 3, H, W] -> [B, D]

    path = download_published("dino_vits16")                                     # weights of the paper, a file

Only the ViT has attention maps and patch tokens. Weights of what is built are random.
"""

import contextlib
import difflib
import hashlib
import os
import sys
import tempfile
import urllib.request
from http.client import HTTPException
from urllib.error import HTTPError, URLError

import torch
import torch.distributed as dist
from torch import nn
from torchvision import models
from torchvision.ops import StochasticDepth

from vit import SIZES, VisionTransformer

PUBLISHED_URL = "https://dl.fbaipublicfiles.com/dino"
PUBLISHED = {  # name in torch.hub -> arguments of build_backbone, and the name of the authors' file
    "dino_vits16": (dict(patch_size=16, **SIZES["vit_small"]), "dino_deitsmall16_pretrain"),
    "dino_vits8": (dict(patch_size=8, **SIZES["vit_small"]), "dino_deitsmall8_pretrain"),
    "dino_vitb16": (dict(patch_size=16, **SIZES["vit_base"]), "dino_vitbase16_pretrain"),
    "dino_vitb8": (dict(patch_size=8, **SIZES["vit_base"]), "dino_vitbase8_pretrain"),
    "dino_resnet50": (dict(arch="resnet50"), "dino_resnet50_pretrain"),
    **{f"dino_{name}": (dict(arch=f"timm:{name}_224"), f"dino_{name}_pretrain") for name in (
        "xcit_small_12_p16", "xcit_small_12_p8", "xcit_medium_24_p16", "xcit_medium_24_p8")}}


class BackboneError(ValueError):
    """Unknown architecture, or one that does not support the image size or stochastic depth."""


class HeadlessClassifier(nn.Module):
    """A torchvision or timm classifier without its head: images [B, 3, H, W] -> features [B, D].

    Dropout is off, stochastic depth is set by drop_path_rate.

    Args:
        arch: name of a torchvision classifier, or "timm:" and the name of a timm model.
        img_size: side of the training images, pixels.
        drop_path_rate: stochastic depth in training, rate of the last block.

    Raises:
        BackboneError: unknown arch, no feature vector at this image size, or no stochastic depth.
    """

    # what a VisionTransformer has too: any side is a multiple of 1
    in_chans, patch_size, blocks, conv_stem = 3, 1, (), False

    def __init__(self, arch: str, img_size: int = 224, drop_path_rate: float = 0.0):
        super().__init__()
        check_arch(arch)
        self.arch, self.grid = arch, (img_size, img_size)
        build = build_timm if arch.startswith("timm:") else build_torchvision
        self.model = build(arch, img_size, drop_path_rate)
        self.embed_dim = self.try_size(img_size, img_size)

    def forward(self, x):
        return self.model(x)

    @torch.no_grad()
    def try_size(self, height: int, width: int) -> int:
        """Width D of the features, found by a forward pass in eval mode on a zero image of this size.

        Raises:
            BackboneError: the model fails at this size, or its output is not a feature vector.
        """
        if not all(type(side) is int and 0 < side <= 4096 for side in (height, width)):
            raise BackboneError(f"{self.arch}: image size {height} x {width} is not from 1 to 4096 pixels")
        training = self.training
        try:
            feature = self.eval().model(torch.zeros(1, 3, height, width, device=next(self.parameters()).device))
        except Exception as error:  # every model has its own
            raise BackboneError(f"{self.arch} does not support images of {height} x {width} pixels: "
                                f"{' '.join(str(error).split())[:200]}") from None
        self.train(training)
        if not isinstance(feature, torch.Tensor) or feature.dim() != 2:
            raise BackboneError(f"{self.arch} does not output one feature vector per image")
        return feature.shape[1]


def check_arch(arch):
    """Raise BackboneError unless torchvision or timm has a classifier of this name."""
    library, known, prefix, name = "torchvision", models.list_models(module=models), "", arch
    if arch.startswith("timm:"):
        import timm

        library, known, prefix, name = f"timm {timm.__version__}", timm.list_models(), "timm:", arch[5:]
    if name not in known:
        known = [*SIZES, *(f"{prefix}{other}" for other in known)]
        close = [other for other in known if other.startswith(arch)] or difflib.get_close_matches(arch, known)
        raise BackboneError(f"{arch} is none of {', '.join(SIZES)} and no classifier of {library}"
                            + "".join(f"; did you mean {match}?" for match in close[:1]))


def build_torchvision(arch, img_size, drop_path_rate):
    """A torchvision classifier with nn.Identity in place of its last linear layer."""
    flags = dict(aux_logits=False, init_weights=True) if arch in ("googlenet", "inception_v3") else {}
    model = models.get_model(arch, weights=None, **flags)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear or model.get_submodule(linear[-1]).out_features != 1000:
        raise BackboneError(f"{arch} does not end in a linear classifier that could be removed")
    model.set_submodule(linear[-1], nn.Identity())
    depths = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    if drop_path_rate and not depths:
        raise BackboneError(f"{arch} has no stochastic depth: --drop_path_rate must be 0")
    highest = max((module.p for module in depths), default=1)
    for module in depths:
        module.p *= drop_path_rate / highest
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # part of the removed head
            module.p = 0.0
    return model


def build_timm(arch, img_size, drop_path_rate):
    """A timm model without its classifier; it takes several image sizes where timm supports that."""
    import timm

    for flags in (dict(img_size=img_size, dynamic_img_size=True), dict(img_size=img_size), {}):
        try:
            return timm.create_model(arch[5:], num_classes=0, drop_path_rate=drop_path_rate or None, **flags)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # no such flag, or no such size
            reason = error
    raise BackboneError(f"{arch} cannot be built: {reason}")


def convert_sync_batchnorm(network):
    """Convert batch norm to SyncBN, with statistics over the images of all GPUs; timm needs its own conversion."""
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    if getattr(network.backbone, "arch", "").startswith("timm:"):  # its layers include the activation
        from timm.layers import convert_sync_batchnorm as convert
    return convert(network)


def broadcast_buffers(network):
    """Copy rank 0's batch norm statistics to all ranks; on the CPU, where there is no SyncBN, they differ."""
    if dist.is_available() and dist.is_initialized():
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def build_backbone(arguments: dict, drop_path_rate: float = 0.0) -> nn.Module:
    """HeadlessClassifier from arguments that contain "arch", VisionTransformer from others."""
    kind = HeadlessClassifier if "arch" in arguments else VisionTransformer
    return kind(**arguments, drop_path_rate=drop_path_rate)


# ---- published weights ----

def is_published(name: str) -> bool:
    """Whether the authors' weights have this name: one of PUBLISHED, or with "_full" the full checkpoint."""
    return name.removesuffix("_full") in PUBLISHED


def download_published(name: str, log=print) -> str:
    """Path of the authors' file of a name, see `is_published` and `download`."""
    file = PUBLISHED[name.removesuffix("_full")][1]
    full = "_full_checkpoint" * name.endswith("_full")
    return download(f"{PUBLISHED_URL}/{file}/{file}{full}.pth", f"{file}{full}.pth", log)


def download(url: str, name: str, log=print) -> str:
    """Path of a file in the cache of torch.hub, to which it is downloaded unless it is there.

    Args:
        name: of the file in the cache.
        log: called with a line before a download, and one that has the SHA-256.

    Raises:
        OSError: it cannot be downloaded.
    """
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    try:
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with lock(f"{path}.lock"):
                if not os.path.exists(path):  # of the ranks of torchrun, the first downloads
                    log(f"downloading {url}")
                    fetch_file(url, path)
    except (OSError, HTTPException) as error:
        if getattr(error, "filename", None) and not isinstance(error, URLError):
            raise OSError(f"{error.filename}: {error.strerror}, set TORCH_HOME to a folder for weights") from None
        reason, advice = getattr(error, "reason", None) or error, "go online, or "
        if isinstance(error, HTTPError):
            reason, advice = f"HTTP {error.code} {reason}", ""
        raise OSError(f"{url} cannot be downloaded ({reason}): {advice}put a copy of the file at {path}") from None
    with open(path, "rb") as file:
        log(f"{path}: SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()}")
    return path


def fetch_file(url, path):
    """Download a file, whole or not at all: torch.hub's function keeps one whose connection was closed midway."""
    request = urllib.request.Request(url, headers={"User-Agent": "torch.hub"})  # some servers refuse Python's own
    folder, name = os.path.split(path)
    with tempfile.TemporaryDirectory(".tmp", f"{name}.", folder) as own:
        temporary = os.path.join(own, name)
        with urllib.request.urlopen(request) as response, open(temporary, "wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            with torch.hub.tqdm(total=size or None, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
                while chunk := response.read(2**20):
                    file.write(chunk)
                    bar.update(len(chunk))
        if size and size != os.path.getsize(temporary):
            raise OSError(f"the connection was closed after {os.path.getsize(temporary)} of {size} bytes")
        os.replace(temporary, path)


@contextlib.contextmanager
def lock(path):
    """Wait until no other process is in this block; not on systems and disks without locks."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.remove(path)
