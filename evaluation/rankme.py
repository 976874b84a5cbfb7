"""RankMe: effective rank of features, a score that needs no labels.

    rank = effective_rank(features)          # 1.0 to min(images, dimensions)

Garrido et al. 2023, "RankMe: Assessing the downstream performance of pretrained self-supervised representations by
their rank", equation 1. Needs torch only.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values of features [M, D], divided by their sum; NaN if some are not finite.

    The features are neither centered nor normalized. Equal features have rank 1, M < D features at most M.
    """
    if not features.isfinite().all():  # as of fp16 that overflows
        return math.nan
    singular_values = torch.linalg.svdvals(features.cpu().double())  # on the CPU: not every device has them
    p = F.normalize(singular_values, p=1, dim=0) + 1e-7
    return torch.special.entr(p).sum().exp().item()
