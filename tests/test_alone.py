"""Concept files, copied alone into another codebase, import and run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORDS = {  # file -> what it says when it is run
    "vit.py": "vit_small/16    21.7 M parameters", "dino_loss.py": "ln K = 8.3178",
    "augment.py": "equal for equal keys: True", "evaluation/knn.py": "top-1", "evaluation/linear.py": "top-1", "evaluation/masks.py": "0.854",
    "evaluation/label_propagation.py": "columns 2 to 9, 100.0%", "evaluation/ranking.py": "1.00  1.00  1.00  1.00",
    "evaluation/descriptor.py": "whitened: variances", "plotting/sheet.py": "three pictures in two columns",
    "plotting/draw.py": "from (0, 0, 4) to (252, 255, 164)", "plotting/curves.py": "training     200   6.200",
    "data/datasets.py": "built-in shapes",
    "common/cli.py": "", "common/precision.py": "bf16: torch.bfloat16", "common/logger.py": "skipped unreadable picture a.jpg",
    "data/loaders.py": "2 processes, step 1", "optim.py": "lars", "common/checkpoint.py": "", "advice.py": "", "benchmarks/checkout.py": ""}
RUN_ALL = """
import contextlib, io, json, os, runpy, sys, traceback
said = {}
for path in sys.argv[1:]:
    os.chdir(os.path.dirname(path))
    sys.path[0] = os.path.dirname(path)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(path, run_name="__main__")
        except Exception:
            print("FAILED", traceback.format_exc())
    said[os.path.basename(path)] = out.getvalue()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each file prints, in a folder of its own; one process imports torch for all."""
    files = []
    for name in WORDS:
        folder = tmp_path_factory.mktemp(Path(name).stem)
        files.append(folder / Path(name).name)
        shutil.copy(ROOT / name, folder)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", RUN_ALL, *map(str, files)], capture_output=True, text=True,
                            timeout=300, env=environment, cwd=files[0].parent)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", WORDS)
def test_runs_alone(said, name):
    assert WORDS[name] in said[Path(name).name] and "FAILED" not in said[Path(name).name], said[Path(name).name]
