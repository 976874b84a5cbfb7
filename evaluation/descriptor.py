"""Global image descriptors for retrieval: multi-scale features, GeM pooling, whitening.

    x = multi_scale_features(model, images)              # landmarks
    x = cls_and_gem_features(model, images)              # copy detection
    whiten = fit_whitening(features_of_other_images)
    similarity = F.normalize(whiten(queries)) @ F.normalize(whiten(database)).T

Settings are those of the released commands for Paris and Copydays. This file needs torch only.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

SCALES = (1.0, 0.5 ** 0.5, 0.5)


def multi_scale_features(model, images: torch.Tensor, scales: Sequence[float] = SCALES) -> torch.Tensor:
    """Sum of an image's features at several scales, L2-normalized: [B, C, H, W] -> [B, D].

    Images are cropped at the right and bottom to multiples of the patch size, as in the released backbone; a side
    shorter than a patch is enlarged to one.

    Args:
        model: images -> features; model.patch_size in pixels.
    """
    patch_size = model.patch_size
    total = 0
    for scale in scales:
        x = images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear")
        if min(x.shape[-2:]) < patch_size:
            x = F.interpolate(x, size=[max(side, patch_size) for side in x.shape[-2:]], mode="bilinear")
        height, width = (side // patch_size * patch_size for side in x.shape[-2:])
        total = total + model(x[..., :height, :width])
    return F.normalize(total, dim=-1)


def cls_and_gem_features(model, images: torch.Tensor, power: float = 4) -> torch.Tensor:
    """CLS token and GeM-pooled patch tokens, concatenated: [B, C, H, W] -> [B, 2D].

    GeM is the generalized mean (Radenovic et al. 2019, equation 3), with tokens clamped from below at 1e-6.
    """
    tokens = model.get_intermediate_layers(images)[0]
    pooled = tokens[:, 1:].clamp(min=1e-6).pow(power).mean(dim=1).pow(1 / power)
    return torch.cat((tokens[:, 0], pooled), dim=1)


def fit_whitening(features: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """PCA whitening fitted to features [M, D] of other images: a function [..., D] -> [..., D].

    It subtracts the mean and decorrelates by the second moments about zero, not the covariance, as in the released
    script. Moments are clamped from below at 1e-5 of the largest.
    """
    features = features.double()
    moments, axes = torch.linalg.eigh(features.T @ features / len(features))
    moments = moments.clamp(min=1e-5 * moments.max())
    mean, projection = features.mean(dim=0), axes / moments.sqrt()
    return lambda x: ((x.double() - mean) @ projection).to(x.dtype)
