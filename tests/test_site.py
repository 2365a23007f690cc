"""The documents as a site, built by `make docs`: every link is followed, and every page is in the contents."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_documents import DOCUMENTS, name_of

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, str(ROOT / "docs" / "site" / "build.py"), str(site)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return site


def test_it_has_every_document(site: Path) -> None:
    pages = {name_of(path) for path in DOCUMENTS if ".github" not in path.parts}
    names = {re.sub(r"(^|/)README\.md$", r"\1index.md", page).replace(".md", ".html") for page in pages}
    assert {name for name in names if not (site / name).exists()} == set()


def test_it_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.findall(r'<(?:link|script|img|iframe)[^>]*(?:src|href)="?https?://[^>]*>', page.read_text())
