"""One vector per picture to find it by: several scales, pooled patches, whitening.

    x = multi_scale(model, images)                       # for landmarks
    x = cls_and_gem(model, images)                       # for copies
    whiten = learn_whitening(features_of_other_pictures)
    similarity = F.normalize(whiten(queries)) @ F.normalize(whiten(database)).T

The settings are those of the released scripts for Oxford, Paris and Copydays. This file needs torch and nothing else.
"""

import torch
import torch.nn.functional as F

SCALES = (1.0, 0.5 ** 0.5, 0.5)


def multi_scale_features(model, images, scales=SCALES):
    """The sum of a picture's features at several sizes, of length 1: [B, C, H, W] -> [B, D].

    Sizes are cut to multiples of the patch at the right and below, as the released backbone does by itself; what would
    be less than a patch is enlarged to one.

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


def cls_and_gem_features(model, images, power=4):
    """CLS beside the patch tokens' generalised mean (Radenovic et al. 2019, equation 3): [B, C, H, W] -> [B, 2D].

    Negative tokens count as 1e-6.
    """
    tokens = model.get_intermediate_layers(images)[0]
    pooled = tokens[:, 1:].clamp(min=1e-6).pow(power).mean(dim=1).pow(1 / power)
    return torch.cat((tokens[:, 0], pooled), dim=1)


def fit_whitening(features):
    """The whitening that features [M, D] of other pictures ask for: a function [..., D] -> [..., D].

    It takes their mean off and makes their second moments (about zero, not about the mean, as released) those of
    independent variables of variance 1. Directions with less than 1e-5 of the largest moment are taken to have that.
    """
    features = features.double()
    moments, axes = torch.linalg.eigh(features.T @ features / len(features))
    moments = moments.clamp(min=1e-5 * moments.max())
    mean, projection = features.mean(dim=0), axes / moments.sqrt()

    def whiten(x):
        return ((x.double() - mean) @ projection).to(x.dtype)
    return whiten


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator)
    white = fit_whitening(torch.randn(5000, 8, generator=generator) @ mixing)(
        torch.randn(5000, 8, generator=generator) @ mixing)
    print(f"correlated features, whitened: variances {white.var(dim=0).min():.2f} to {white.var(dim=0).max():.2f}, "
          f"largest correlation {(torch.corrcoef(white.T) - torch.eye(8)).abs().max():.2f}")
