"""What a source distribution holds, and that what is written about installing is so."""

import configparser
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from sb3_a3c import __version__

CHECKOUT = Path(__file__).parent.parent
FOLDERS = ["sb3_a3c", "docs", "examples", "tests", ".ci", ".github"]
FILES = [
    ".readthedocs.yaml",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "conftest.py",
    "constraints.txt",
    "pyproject.toml",
    "setup.cfg",
]


def test_source_distribution(tmp_path: Path) -> None:
    """Made from a copy, as setuptools writes into the checkout."""
    copy = tmp_path / "copy"
    for folder in FOLDERS:
        shutil.copytree(CHECKOUT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "_build"))
    for name in [*FILES, "MANIFEST.in"]:
        shutil.copy(CHECKOUT / name, copy)
    files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    expected = {name for name in files if not name.endswith("_checkpoint.zip")}  # of unfinished runs, 18 MB each
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=copy, timeout=120, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {member.name.partition("/")[2] for member in tar if member.isfile()}
    assert expected <= names
    assert {name for name in names - expected if ".egg-info/" not in name} == {"PKG-INFO"}


def test_extras_and_versions() -> None:
    setup = configparser.ConfigParser()
    setup.read(CHECKOUT / "setup.cfg")
    extras = {name: set(packages.split()) for name, packages in setup["options.extras_require"].items()}
    assert {"pandas", "matplotlib", "moviepy", "tensorboard"} <= extras["atari"]  # load_results, curves, --record, logs
    versions = re.findall(r":: (3\.\d+)$", setup["metadata"]["classifiers"], re.MULTILINE)
    assert versions == ["3.11", "3.12", "3.13"]
    assert f"Python {versions[0]}, {versions[1]} and {versions[2]}" in (CHECKOUT / "README.md").read_text()
    assert f"for other in {' '.join(f'python{version}' for version in versions[1:])};" in (CHECKOUT / ".ci/run").read_text()


def test_version_is_the_same_everywhere() -> None:
    assert f"version: {__version__}\n" in (CHECKOUT / "CITATION.cff").read_text()
    released = re.findall(r"^## \[(\d.*)\] - \d{4}-\d\d-\d\d$", (CHECKOUT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == __version__


def test_nothing_is_installed_by_a_name_that_is_not_published() -> None:
    for path in [*(CHECKOUT / "sb3_a3c").rglob("*.py"), *CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/*.md")]:
        assert not re.search(r"pip install[^\n]*\bsb3[-_]a3c\b", path.read_text()), path
