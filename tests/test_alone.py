"""Concept files, copied alone into another codebase, import and run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name, words", [
    ("vit.py", "vit_small/16    21.7 M parameters"), ("dino_loss.py", "ln K = 8.3178"),
    ("augment.py", "equal for equal keys: True"), ("knn.py", "top-1"), ("probe.py", "top-1"),
    ("masks.py", "0.854"), ("propagate.py", "columns 2 to 9, 100.0%"), ("ranking.py", "1.00  1.00  1.00  1.00"),
    ("descriptor.py", "whitened: variances"), ("sheet.py", "three pictures in two columns"),
    ("draw.py", "from (0, 0, 4) to (252, 255, 164)"), ("curves.py", "training     200   6.200"),
    ("data.py", "built-in shapes"), ("cli.py", ""),
    ("precision.py", "bf16: torch.bfloat16"), ("report.py", "skipped unreadable picture a.jpg"),
    ("batches.py", "2 processes, step 1"), ("optim.py", "lars"), ("resume.py", "")])
def test_runs_alone(tmp_path, name, words):
    shutil.copy(ROOT / name, tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run([sys.executable, name], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                            env=environment)
    assert result.returncode == 0 and words in result.stdout, result.stderr
