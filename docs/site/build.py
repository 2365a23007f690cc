"""The documents as a site: python docs/site/build.py [SITE]

A link that leads nowhere, or a page that is not in the contents, is an error.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGES = (
    "*.md",
    "docs/*.md",
    "docs/*.svg",
    "docs/*.png",
    "deploy/*.md",
    "examples/*/README.md",
    "benchmarks/results/*.svg",
)
"""What is shown, pictures included; in the same folders as here, so that a link leads to the same in both."""


def copy_pages(source: Path) -> None:
    shutil.rmtree(source, ignore_errors=True)
    for page in (path for pattern in PAGES for path in ROOT.glob(pattern)):
        copy = source / page.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, copy)


def main() -> int:
    copy_pages(ROOT / ".cache" / "site-source")
    site = sys.argv[1:] or [str(ROOT / ".cache" / "site")]
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(HERE / "mkdocs.yml")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # the theme's makers advertise their next one
    return subprocess.run([*command, "--site-dir", *site], env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
