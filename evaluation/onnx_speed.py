"""Speed of an exported ONNX file in ONNX Runtime, beside torch or beside another file.

    print_speed(backbone, model, metadata, batch)              # beside torch and torch.compile
    line = time_files(int8_model, fp32_model, feed)         # on the CPU
"""

import onnxruntime
import torch

from backbones import HeadlessClassifier
from common.estimate import time_call
from common.precision import DTYPES
from evaluation.onnx_parity import build_inputs

ROUNDS = 15


def open_session(model, providers=()):
    """ONNX Runtime session of a file, given as bytes, with as many threads as torch; the CPU is the last provider."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would slow others in their turns
    return onnxruntime.InferenceSession(model, options, providers=[*providers, "CPUExecutionProvider"])


def time_in_turns(functions, device="cpu"):
    """Seconds per call of each function, and relative to the first in each round: medians of alternating rounds.

    Returns:
        two tensors [functions].
    """
    for function in functions:
        function()  # warm-up
    seconds = torch.tensor([[time_call(function, device) for function in functions] for _ in range(ROUNDS)])
    return seconds.median(dim=0).values, (seconds / seconds[:, :1]).median(dim=0).values


@torch.no_grad()
def print_speed(backbone, model, metadata, batch):
    """Print images per second of a file, given as bytes, of torch and of torch.compile."""
    providers = [("CUDAExecutionProvider", {"use_tf32": 0})] if torch.cuda.is_available() else []  # as torch in fp32
    session = open_session(model, providers)
    provider = session.get_providers()[0]
    if providers and provider == "CPUExecutionProvider":
        print("ONNX Runtime has no CUDA provider here: timed on the CPU")
    device = "cuda" if provider == "CUDAExecutionProvider" else "cpu"
    precision = "fp16" if device == "cuda" and metadata["precision"] != "fp32" else "fp32"
    height, width = metadata["image_size"] or [side * backbone.patch_size for side in backbone.grid]
    x, feed = next(build_inputs(backbone, batch, height, width, metadata))
    network, x = (thing.to(device, DTYPES[precision]) for thing in (backbone, x))
    eager = network if isinstance(backbone, HeadlessClassifier) else network.forward_with_attention
    compiled = torch.compile(eager)
    binding = session.io_binding()  # input and outputs stay on the device
    binding.bind_ortvalue_input("image", onnxruntime.OrtValue.ortvalue_from_numpy(feed, device))
    for name in metadata["outputs"]:
        binding.bind_output(name, device)
    functions = {f"ONNX Runtime, {provider}, {metadata['precision']}": lambda: session.run_with_iobinding(binding),
                 f"torch {device}, {precision}": lambda: eager(x)}
    try:
        compiled(x)
        functions[f"torch {device}, {precision}, compiled"] = lambda: compiled(x)
    except Exception as error:  # no C++ compiler or no Triton
        print(f"torch.compile failed here: {str(error).strip().splitlines()[0]}")
    print(f"{batch} x {height} x {width}, {ROUNDS} rounds")
    for name, seconds, ratio in zip(functions, *time_in_turns([*functions.values()], device)):
        print(f"  {name}: {batch / seconds:.1f} img/s, ONNX Runtime is {ratio:.2f}x as fast")


def time_files(int8_model, fp32_model, feed):
    """A line on images per second of a quantized file and the fp32 file, both as bytes, on the CPU.

    Args:
        feed: input of both, [B, ...].
    """
    sessions = [open_session(model) for model in (int8_model, fp32_model)]
    seconds, ratios = time_in_turns([lambda s=session: s.run(None, {"image": feed}) for session in sessions])
    int8, fp32 = (len(feed) / seconds).tolist()
    return (f"CPU, {torch.get_num_threads()} threads, batch {len(feed)}: {int8:.1f} img/s, fp32 {fp32:.1f} img/s, "
            f"{ratios[1]:.2f}x as fast (medians of {ROUNDS} rounds)")
