"""docs/security.md names a test for each promise: all of them exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_promise_names_a_test_that_there_is() -> None:
    rows = re.findall(r"^\| (.+) \| (`tests/.+`) \|$", (ROOT / "docs" / "security.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    for promise, named in rows:
        for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", named):
            assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE), promise
