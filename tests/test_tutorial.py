"""The tutorial notebook: commands, links and prose hold, and its outputs are those of a good run."""

import re
import shlex
import shutil
from pathlib import Path

import nbformat
import pytest

import evaluate
import export
import infer
import retrieve
import train
import visualize

ROOT = Path(__file__).parents[1]
PATH = ROOT / "docs" / "tutorial.ipynb"
PARSERS = {"train.py": train.parse_args, "evaluate.py": evaluate.parse_args, "visualize.py": visualize.parse_args,
           "export.py": export.parse_args, "retrieve.py": retrieve.parse_args, "infer.py": infer.main}


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PATH, as_version=4)


def code_cells(notebook):
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def prose(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def list_commands(notebook):
    """[(script, arguments)] of each line `!python SCRIPT`, with the settings in place, and one word for other values.
    """
    cells, settings = code_cells(notebook), {}
    exec(cells["settings"].source, settings)
    lines = [line for cell in cells.values() for line in cell.source.splitlines() if line.startswith("!python ")]
    lines = [re.sub(r"\{(\w+)\}", lambda m: settings.get(m[1], "x.png"), line) for line in lines]
    lines = [re.sub(r"\{[^}]*\}", "x.png", line).removesuffix(" 2>&1 | cat") for line in lines]
    return [(script, arguments) for _, script, *arguments in map(shlex.split, lines)]


def read_output(cell):
    """What a cell has printed; commands run in a terminal, which ends lines by "\\r\\n"."""
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    return text.replace("\r\n", "\n")


def find(pattern, text):
    """The first group of a pattern that the text must have."""
    found = re.search(pattern, text, re.MULTILINE)
    assert found, f"{pattern} not in: {text}"
    return found[1]


def check_numbers(notebook):
    """Raise AssertionError unless the features are good, the ONNX file agrees, and neighbors have the query's class."""
    printed = {name: read_output(cell) for name, cell in code_cells(notebook).items()}
    raw = float(find(r"^k-NN, raw pixels +([\d.]+)", printed["table"]))
    trained = float(find(r"^k-NN, trained backbone +([\d.]+)", printed["table"]))
    assert raw == pytest.approx(float(find(r"^k-NN of raw pixels: top-1 ([\d.]+)%", printed["train"])), abs=0.1)
    assert trained == pytest.approx(float(find(r"^ +20 +([\d.]+) +[\d.]+", printed["knn"])), abs=0.1)
    assert trained > 85 and trained > raw + 20

    differences = re.findall(r"at most (\S+) from torch", printed["export"])
    assert len(differences) == 2 and max(map(float, differences)) < 1e-4
    assert float(find(r"images: (\S+)$", printed["parity"])) < 1e-4

    query = find(r"^\S+/test/([^/]+)/\S+:\s*$", printed["search"])
    neighbors = re.findall(r"^ +[\d.]+ +\S+/train/([^/]+)/\S+\s*$", printed["search"], re.MULTILINE)
    assert len(neighbors) == 5 and neighbors.count(query) >= 4


def check_outputs(notebook):
    """Raise AssertionError unless all cells were run once, in order, without errors and warnings, with figures."""
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    for name, cell in cells.items():
        text = read_output(cell)
        assert all(output.output_type != "error" and output.get("name") != "stderr" for output in cell.outputs), name
        assert not re.search(r"warning|traceback|\berror\b", text, re.IGNORECASE), text
        assert not re.search(r"[\r\x1b]", text), f"{name} has a progress bar"
        assert not re.search(r"^!python|\bprint\(", cell.source, re.MULTILINE) or text, name
        images = [kind for output in cell.outputs for kind in output.get("data", {}) if kind.startswith("image/")]
        assert len(images) == len(re.findall(r"plt\.show\(|^show_sheet\(", cell.source, re.MULTILINE)), name


# ---- structure ----

def test_the_notebook_is_valid(notebook):
    nbformat.validate(notebook)
    assert notebook.nbformat == 4 and notebook.metadata.kernelspec.name == "python3"


def test_commands_have_flags_that_exist(notebook, monkeypatch, tmp_path):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    commands = list_commands(notebook)
    assert {script for script, _ in commands} == PARSERS.keys()
    for script, arguments in commands:
        assert (ROOT / script).is_file()
        PARSERS[script](arguments)  # exits on an unknown flag


def test_other_code_compiles(notebook):
    for cell in code_cells(notebook).values():
        compile(re.sub(r"^( *)!.*", r"\1pass", cell.source, flags=re.MULTILINE), cell.id, "exec")


def test_links_lead_somewhere(notebook, check_links):
    targets = check_links(prose(notebook), PATH.parent)
    assert len(targets) > 8 and all((PATH.parent / target).is_file() for target in targets)


def test_prose_has_no_numbers_that_nothing_computes(notebook):
    words = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", prose(notebook), flags=re.DOTALL)
    assert set(re.findall(r"\S*\d\S*", words)) <= {"2021,", "int8,"}


def test_code_and_prose_name_no_folder_of_a_machine(notebook):
    source = "\n".join(cell.source for cell in notebook.cells)
    assert not re.search(r"(?<![\w.:/}])/(?!content/)[a-z]+/", source)


# ---- outputs ----

def test_all_cells_have_run_in_order_without_warnings(notebook):
    check_outputs(notebook)


def test_outputs_show_good_features(notebook):
    check_numbers(notebook)


def test_outputs_are_small_and_name_no_folder_of_a_machine(notebook):
    assert PATH.stat().st_size < 700_000
    for name, cell in code_cells(notebook).items():
        text = str([output.get("text", output.get("data", {}).get("text/plain")) for output in cell.outputs])
        folders = set(re.findall(r"(?<![\w.:/])/\w[\w.-]*(?=/)|[A-Z]:\\\\", text))
        assert folders <= {"/content"}, f"{name}: {folders}"  # Colab's folder


# ---- execution ----

@pytest.mark.slow
def test_the_notebook_runs_in_a_copy(notebook, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    left_out = (".git", "runs", "shapes_folder", "node_modules", "__pycache__", ".*_cache", ".venv")
    shutil.copytree(ROOT, tmp_path / "dino", ignore=shutil.ignore_patterns(*left_out))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.from_dict(notebook.copy())
    folder = {"metadata": {"path": str(tmp_path / "dino" / "docs")}}
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=folder).execute()
    check_outputs(notebook)
    check_numbers(notebook)
    assert (tmp_path / "dino" / "runs" / "tutorial" / "teacher.onnx").is_file()
