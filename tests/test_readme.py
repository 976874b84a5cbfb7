"""README and docs: line counts, links and figures are true."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def count_lines(path):
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.suffix in (".py", ".txt", ".md")]
    return sum(len(file.read_text().splitlines()) for file in files if "fixtures" not in file.parts)


def test_line_counts_in_the_table_of_files():
    rows = re.findall(r"^\| `([\w./]+)` \| ([\d,]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 20
    for name, count in rows:
        assert int(count.replace(",", "")) == pytest.approx(count_lines(ROOT / name), rel=0.1), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page, check_links):
    check_links(page.read_text(), page.parent)


def test_the_readme_fits_200_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
