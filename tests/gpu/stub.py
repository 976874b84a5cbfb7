"""A CUDA device without hardware: torch's own CUDA build on cuda_stub.cpp, where kernels compute nothing.

    python tests/gpu/stub.py FOLDER                                 # builds the stub in FOLDER, unless it is there
    python tests/gpu/stub.py FOLDER train.py --device cuda ...      # runs a script on it

torch's allocator, autograd, streams, process groups, DDP, Inductor and Triton are the real ones, so launches, host
syncs, copies, collectives, graph breaks and peak memory are those of a GPU. Values are meaningless. STUB_GPUS in the
environment is the number of devices. Needs g++, nm, and the CUDA headers of Triton.
"""

import ctypes
import functools
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import torch
from torch import library

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
LIBRARY = "libcuda.so.1"  # the name under which Triton looks for the driver
NVIDIA_FUNCTION = r"__cuda|(cu|cuda|nccl|cublas|cudnn)[A-Z]"


def build(folder):
    """Compile cuda_stub.cpp, and an empty function for whatever else torch needs of NVIDIA's libraries."""
    lib = Path(torch.__file__).parent / "lib"
    needed = set()
    for path in lib.glob("lib*.so"):
        needed |= {name for name in list_symbols(path, "--undefined-only") if re.match(NVIDIA_FUNCTION, name)}
    headers = lib.parents[1] / "triton" / "backends" / "nvidia" / "include"
    compiler = ["g++", "-std=c++17", "-O1", "-fPIC", f"-I{headers}"]
    subprocess.run([*compiler, "-c", HERE / "cuda_stub.cpp", "-o", folder / "stub.o"], check=True)
    missing = sorted(needed - list_symbols(folder / "stub.o", "--defined-only"))
    (folder / "rest.cpp").write_text("".join(f'extern "C" int {name}() {{ return 0; }}\n' for name in missing))
    subprocess.run([*compiler, "-shared", folder / "stub.o", folder / "rest.cpp", "-o", folder / LIBRARY], check=True)


def list_symbols(path, which):
    """Names of the functions that a library or object file defines, or needs."""
    options = [which] if path.suffix == ".o" else ["-D", which]
    lines = subprocess.run(["nm", *options, path], capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


def environment(folder):
    """Environment variables that put the stub in front of NVIDIA's libraries, and keep what it compiles apart."""
    return dict(LD_PRELOAD=f"{folder / LIBRARY}", LD_LIBRARY_PATH=f"{folder}", TRITON_LIBCUDA_PATH=f"{folder}",
                TRITON_CACHE_DIR=f"{folder / 'triton'}", TORCHINDUCTOR_CACHE_DIR=f"{folder / 'inductor'}",
                TORCHINDUCTOR_COMPILE_THREADS="1", TORCH_CUDNN_V8_API_DISABLED="1", OMP_NUM_THREADS="1")


def is_loaded():
    """Whether this process runs on the stub."""
    return LIBRARY in os.environ.get("LD_PRELOAD", "")


def take_counts():
    """{call: how often} since the last time, such as "kernel ...", "gemm bf16", "copy pageable to device"."""
    buffer = ctypes.create_string_buffer(1 << 22)
    if ctypes.CDLL(None).stub_take_counts(buffer, len(buffer)):
        raise BufferError("more counts than fit the buffer")
    return {what: int(times) for what, times in (line.rsplit("\t", 1) for line in buffer.value.decode().splitlines())}


def replace_what_needs_values():
    """Let checks of all values succeed and masks select everything; choose attention that needs no cuDNN graphs."""
    library.impl("aten::all", "cuda", lambda values: true_on(values.device).clone())
    library.impl("aten::nonzero", "cuda", lambda mask: torch.ones(mask.shape).nonzero().to(mask.device))
    torch.backends.cuda.enable_cudnn_sdp(False)


@functools.cache
def true_on(device):
    return torch.tensor(True, device=device)


def main(folder, *argv):
    folder = Path(folder).resolve()
    if not (folder / LIBRARY).exists():
        build(folder)
    if argv and not is_loaded():  # libraries are preloaded at the start of a process only
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment(folder))
    if argv:
        sys.argv, sys.path[:1] = list(argv), [str(Path(argv[0]).parent), str(ROOT)]
        replace_what_needs_values()
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
