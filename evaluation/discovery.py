"""Unsupervised object discovery: one object of an image from the patch keys of a backbone, by LOST or TokenCut.

    keys = extract_keys(backbone, image)            # [1, C, H, W] -> [H/p, W/p, D], of the last attention block
    mask = discover_lost(keys)                      # bool [H/p, W/p], or discover_tokencut(keys)
    boxes = find_component_boxes(mask)              # [1, 4]: left, top, right, bottom, in patches

LOST: Siméoni et al. 2021, "Localizing Objects with Self-Supervised Transformers and no Labels", section 3.
TokenCut: Wang et al. 2022, "Self-Supervised Transformers for Unsupervised Object Discovery using Normalized Cut",
section 3. Both compute in float64 on the CPU. LOST needs memory in proportion to the N patches, TokenCut for one matrix
of N x N, 104 MB for the 3,600 patches of 480 x 480 pixels and patch size 8. Needs torch, numpy and scipy only.
"""

import numpy as np
import torch
from torch import Tensor

ROWS = 512  # of a matrix of N x N that are computed at a time
MAX_PATCHES = 20_000  # N for which TokenCut's matrix has 3.2 GB


@torch.no_grad()
def extract_keys(model, image: Tensor) -> Tensor:
    """Keys of all heads of the last block: image [1, C, H, W] -> float64 [H/p, W/p, D] on the CPU."""
    x, last = model.run_to_last_block(image), model.blocks[-1]
    keys = last.attn.split_heads(last.norm1(x))[1]  # [1, heads, 1+N, D/heads]
    return keys.transpose(1, 2).flatten(2)[0, 1:].cpu().double().unflatten(0, (image.shape[2] // model.patch_size, -1))


def discover_lost(keys: Tensor, k: int = 100) -> Tensor:
    """LOST: the patches that correlate with a seed of few correlations, and with those like it.

    The seed is the patch whose key has a positive product with the fewest others. It is expanded by those of the k
    patches of lowest degree whose product with it is positive. The object is where the sum of the products with these
    is positive, and connected with the seed.

    Args:
        keys: [h, w, D], not normalized.

    Returns:
        bool [h, w].
    """
    f = keys.flatten(0, 1).double()
    degree = torch.cat([(rows @ f.T > 0).sum(dim=1) for rows in f.split(ROWS)])
    order = degree.argsort(stable=True)  # of equal degrees, the first patch
    seed, lowest = order[0], f[order[:k]]
    similar = lowest[lowest @ f[seed] > 0]
    return find_component((f @ similar.sum(dim=0) > 0).view(keys.shape[:2]), seed)


def discover_tokencut(keys: Tensor, tau: float = 0.2, eps: float = 1e-5) -> Tensor:
    """TokenCut: normalized cut (Shi and Malik 2000) of the graph of all patches into an object and the background.

    An edge weighs 1 if the cosine similarity of the keys is above tau, else eps. The eigenvector y of the second
    smallest eigenvalue of (D - W) y = lambda D y is cut at its mean; the object is the side of the patch with the
    largest absolute value, as far as it is connected with it. A graph without an edge of eps has no cut: its object is
    the whole image.

    Args:
        keys: [h, w, D].

    Returns:
        bool [h, w].
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    f = torch.nn.functional.normalize(keys.flatten(0, 1).double(), dim=1)
    weights = np.empty((len(f), len(f)))
    for first in range(0, len(f), ROWS):
        weights[first:first + ROWS] = (f[first:first + ROWS] @ f.T > tau).numpy()
    if weights.all():
        return torch.ones(keys.shape[:2], dtype=torch.bool)
    if len(f) == 2:  # too few for Lanczos iterations: y is (1, -1), and the first patch the seed
        return torch.tensor([True, False]).view(keys.shape[:2])
    np.maximum(weights, eps, out=weights)
    # with z = D^0.5 y: the second largest eigenvalue of D^-0.5 W D^-0.5, by Lanczos iterations
    scale = weights.sum(axis=1) ** -0.5
    product = LinearOperator(weights.shape, lambda z: scale * (weights @ (scale * z.ravel())), dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(len(f))  # the same result each time
    values, vectors = eigsh(product, k=2, which="LA", v0=start, tol=1e-10)
    y = torch.from_numpy(scale * vectors[:, values.argmin()])
    seed = (y.abs() > (1 - 1e-8) * y.abs().max()).nonzero()[0]  # the first of patches with the same neighbors
    above = y > y.mean()
    return find_component((above if above[seed] else ~above).view(keys.shape[:2]), seed)


METHODS = {"lost": discover_lost, "tokencut": discover_tokencut}


# ---- components and boxes ----

def find_component(mask, patch):
    """Patches of a mask, bool [h, w], that are connected with one of it, by its flat index: bool [h, w]."""
    labels = label_components(mask)
    return labels == labels.flatten()[patch]


def find_component_boxes(mask: Tensor) -> Tensor:
    """Bounding box of each connected component of a mask, bool [H, W] -> int64 [n, 4], left, top, right, bottom."""
    from scipy.ndimage import find_objects

    boxes = [(x.start, y.start, x.stop, y.stop) for y, x in find_objects(label_components(mask).numpy())]
    return torch.tensor(boxes, dtype=torch.int64).view(-1, 4)


def label_components(mask):
    """Number of the component of each pixel, 0 for none: bool [H, W] -> int32 [H, W].

    Pixels are connected to their four neighbors.
    """
    from scipy.ndimage import label

    return torch.from_numpy(label(mask.numpy())[0])
