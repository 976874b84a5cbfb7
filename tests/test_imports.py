"""Imports run downward: scripts, evaluation and plotting, data, common, backbones, the method."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHOD = ("vit", "dino_loss", "augment", "optim", "onnx_graph", "infer")
LEVELS = [METHOD, ("backbones",), ("hubconf", "common"), ("data",), ("evaluation", "plotting"),
          ("train", "evaluate", "export", "segment", "retrieve", "visualize"), ("benchmarks",)]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = sorted(path.relative_to(ROOT) for pattern in ("*.py", *(f"{name}/*.py" for name in LEVEL))
               for path in ROOT.glob(pattern))


def local_imports(path):
    """Top-level names of this repository that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        yield from (top for name in names if (top := name.partition(".")[0]) in LEVEL)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_run_downward(file):
    own = file.parts[0].removesuffix(".py")
    wrong = [name for name in local_imports(ROOT / file) if LEVEL[name] >= LEVEL[own] and name != own]
    if own == "export":
        wrong = [name for name in wrong if name != "infer"]  # `export.py run`
    assert wrong == []


def test_every_file_has_a_level():
    assert len(FILES) > 40 and {file.parts[0].removesuffix(".py") for file in FILES} == LEVEL.keys()
