"""Shell blocks, tables and links of README.md and docs/; conftest.py runs the Python blocks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
README = CHECKOUT / "README.md"
PAGES = [README, CHECKOUT / "CONTRIBUTING.md", *sorted(CHECKOUT.glob("docs/*.md"))]
NAMES = [path.name for path in PAGES]
OUTSIDE_SPHINX = ["README.md", "CONTRIBUTING.md", "examples/results/pong_settings/README.md"]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)", without_code(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_each_shell_block_is_run_or_says_why_not(page: Path) -> None:
    script = (CHECKOUT / ".ci/run").read_text()
    before_and_block = re.findall(r"([^\n]*)\n```(?:bash|sh|console)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    for before, block in before_and_block:
        if not re.fullmatch("<!-- not run in CI: .+ -->", before):
            for line in block.splitlines():
                assert re.sub(" +#.*", "", line) in script


@pytest.mark.parametrize("name", OUTSIDE_SPHINX)
def test_links_that_sphinx_does_not_check(name: str) -> None:
    page = CHECKOUT / name
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", without_code(page.read_text()))
    assert links or page != README
    for link in links:
        target, _, anchor = link.partition("#")
        assert (page.parent / target).exists(), link
        assert not anchor or anchor in anchors(page.parent / target), link


def test_readme_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert max(len(cell) for line in lines if line.startswith("|") for cell in line.split("|")) <= 120


@pytest.mark.slow
def test_cartpole_of_readme(tmp_path: Path) -> None:
    """It takes less than a minute on two cores, and prints about 500."""
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False)
    assert result.returncode == 0, result.stderr
    (mean,) = re.findall(r"^Return of 20 episodes: (\d+) ", result.stdout, re.MULTILINE)
    assert int(mean) >= 400
