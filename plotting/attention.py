"""Who looks at a picture: a backbone, or the file that export.py made of it.

    look, origin = open_attention(args)                     # of the flags of cli.add_model_flags, and --image_size
    seen, maps = look(picture)                              # RGB image -> what was seen of it, [heads, rows, columns]
"""

import numpy as np
import torch

import infer
from common.weights import CheckpointError, open_backbone
from data.loaders import default_attention_size, normalize, resize_to_patches


def open_attention(args):
    """A function from pictures to the attention of CLS over patches in the last block, and where it comes from.

    A backbone, and an exported file for any size, sees the whole picture, its shorter side resized to --image_size; an
    exported file of a fixed size sees the crop that it was made for. Exported files run on the CPU.

    Returns:
        look: RGB image -> the part of it that was seen, RGB, and float32 [heads, rows, columns]; each head's sum is 1
            less what CLS gives to itself.
        origin: see `open_backbone`.
    """
    return (exported if (args.ckpt or "").lower().endswith(".onnx") else trained)(args)


def trained(args):
    model, _, origin = open_backbone(args, needs="attention")
    p = model.patch_size
    shorter = args.image_size or default_attention_size(model.grid[0] * p, p)

    @torch.no_grad()
    def look(picture):
        x = normalize(resize_to_patches(picture, shorter, p))[None].to(args.device)
        attention = model.forward_with_attention(x)[1][0]  # [heads, N]
        return picture, attention.unflatten(1, (x.shape[2] // p, -1)).cpu().numpy()
    return look, origin


def exported(args):
    if args.untrained or args.checkpoint_key:
        raise CheckpointError(f"{args.ckpt}: an exported file has neither --untrained nor --checkpoint_key")
    try:
        session, about = infer.open_model(args.ckpt)
        p, size, mean, trained_size, outputs = (about[name] for name in (
            "patch_size", "image_size", "mean", "trained_size", "outputs"))
    except Exception as error:  # of ONNX Runtime's own kinds
        raise CheckpointError(f"{args.ckpt}: not a file of export.py that can be run here ({error})") from None
    if "attention" not in outputs:
        raise CheckpointError(f"{args.ckpt}: gives features alone, this needs attention")
    if not mean:
        raise CheckpointError(f"{args.ckpt}: takes other channels than red, green and blue")
    if size and args.image_size:
        raise CheckpointError(f"{args.ckpt}: takes {size[0]} x {size[1]} pixels; leave --image_size out, or export it "
                              f"with --dynamic size")
    shorter = args.image_size or default_attention_size(trained_size, p)

    def look(picture):
        view = infer.prepare(picture, about) if size else resize_to_patches(picture, shorter, p)
        maps = infer.infer(session, about, view)[1]
        return view if size else picture, maps.reshape(-1, *maps.shape[-2:]).astype(np.float32)
    return look, dict(ckpt=args.ckpt)
