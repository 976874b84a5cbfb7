"""Attention maps of a backbone, or of an ONNX file that export.py made of it.

    extract_attention, origin = open_attention(args)    # flags of cli.add_model_flags, --device and --image_size
    view, maps = extract_attention(image)   # image -> the part that the model sees, [heads, h, w]
"""

import numpy as np
import torch

import infer
from common.checkpoint import CheckpointError
from common.weights import open_backbone
from data.loaders import default_attention_size, normalize, resize_to_patches
from plotting.sheet import describe_model


def open_attention(args, rgb_only=False):
    """Load a model whose attention is wanted: CLS over patches, in the last block.

    A backbone, or an ONNX file with dynamic size, gets the whole image, its shorter side resized to --image_size. An
    ONNX file with a fixed size gets the crop it was exported for, and runs on the CPU.

    Returns:
        extract_attention: image -> (the part of it that the model sees, float32 [heads, h, w]); each head sums
            to 1 minus the attention of CLS to itself.
        origin: see `open_backbone`; also "patch_size", "channels" of images, and "model" for titles.
    """
    if (args.ckpt or "").lower().endswith(".onnx"):
        return open_onnx_attention(args, rgb_only)
    model, info, origin = open_backbone(args, needs="attention", rgb_only=rgb_only)
    p = model.patch_size
    shorter_side = args.image_size or default_attention_size(model.grid[0] * p, p)

    def extract_attention(image):
        return image, compute_attention(model, image, shorter_side, info, args.device)
    return extract_attention, origin | dict(patch_size=p, channels=info["channels"],
                                            model=describe_model(origin, info, p))


@torch.no_grad()
def compute_attention(model, image, shorter_side, info, device):
    """Attention of a vit.py model to an image, or [C, H, W] in [0, 1]: float32 [heads, h, w].

    Args:
        info: mean and std.
    """
    p = model.patch_size
    x = normalize(resize_to_patches(image, shorter_side, p), info["mean"], info["std"])[None].to(device)
    attention = model.forward_with_attention(x)[1][0].float()  # [heads, N]
    return attention.unflatten(1, (x.shape[2] // p, -1)).cpu().numpy()


def open_onnx_attention(args, rgb_only):
    if args.untrained or args.checkpoint_key:
        raise CheckpointError(f"{args.ckpt}: --untrained and --checkpoint_key do not apply to an ONNX file")
    try:
        session, about = infer.open_model(args.ckpt)
    except Exception as error:  # ONNX Runtime has error types of its own
        raise CheckpointError(f"{args.ckpt}: not a file of export.py that can run here ({error})") from None
    if "attention" not in about.get("outputs", ()) or not about["mean"]:
        raise CheckpointError(f"{args.ckpt}: no attention or no mean in its metadata; export a model of vit.py again")
    if rgb_only and about.get("channels"):
        raise CheckpointError(f"{args.ckpt}: takes images of {about['channels']} channels, here they are RGB")
    size, p = about["image_size"], about["patch_size"]
    if size and args.image_size:
        raise CheckpointError(f"{args.ckpt}: takes {size[0]} x {size[1]} pixels; leave --image_size out")
    shorter_side = args.image_size or default_attention_size(about["trained_size"], p)

    def extract_attention(image):
        view = image if size else resize_to_patches(image, shorter_side, p)
        view = view.numpy() if isinstance(view, torch.Tensor) else view
        view = infer.prepare(view, about) if size else view
        try:
            maps = infer.infer(session, about, view)[1]
        except Exception as error:
            width, height = view.shape[:0:-1] if isinstance(view, np.ndarray) else view.size
            raise CheckpointError(f"{args.ckpt}: cannot run on {width} x {height} pixels: {error}") from None
        view = torch.from_numpy(view) if isinstance(view, np.ndarray) else view
        return view if size else image, maps.reshape(-1, *maps.shape[-2:]).astype(np.float32)
    origin = dict(ckpt=args.ckpt, untrained=False, value_range=about.get("value_range"))
    return extract_attention, origin | dict(patch_size=p, channels=about.get("channels"),
                                            model=describe_model(origin, about, p))


def note_coarse_map(name, image, grid, patch_size, remedy="set"):
    """Print a note if a model sees few patches, [h, w], of an image that has pixels for many; returns whether it does.

    Args:
        remedy: what to do with --image_size.
    """
    finer = min(30, min(image.size) // patch_size) * patch_size
    if min(grid) >= 15 or finer < 2 * min(grid) * patch_size:
        return False
    print(f"NOTE: the model sees {grid[1]} x {grid[0]} patches of {name}; "
          f"{remedy} --image_size {finer} for a finer map")
    return True
