"""How many cores a draft model's runtime may use."""

from pathlib import Path

import psutil
import pytest

from edge_client.drafters.cores import usable_cores


@pytest.fixture(autouse=True)
def _many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 32 if logical else 16)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: list(range(32)), raising=False)


def written(root: Path, **files: str) -> Path:
    for name, text in files.items():
        file = root / name.replace("__", "/").replace("_max", ".max").replace("cpu_cfs", "cpu.cfs")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_without_limits_it_is_the_machine_s_cores(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == 16
    assert usable_cores(written(tmp_path, proc__self__cgroup="0::/\n", sys__fs__cgroup__cpu_max="max 100000\n")) == 16


@pytest.mark.parametrize(("quota", "cores"), [("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1)])
def test_a_container_has_its_share(tmp_path: Path, quota: str, cores: int) -> None:
    assert usable_cores(written(tmp_path, proc__self__cgroup="0::/\n", sys__fs__cgroup__cpu_max=quota)) == cores


def test_the_least_of_the_groups_around_it_counts(tmp_path: Path) -> None:
    root = written(tmp_path, proc__self__cgroup="0::/user/edge\n", sys__fs__cgroup__user__cpu_max="300000 100000")
    assert usable_cores(written(root, sys__fs__cgroup__user__edge__cpu_max="max 100000")) == 3


def test_the_older_kind_of_groups_is_read_too(tmp_path: Path) -> None:
    group = "sys__fs__cgroup__cpu__cpu_cfs_"
    files = {f"{group}quota_us": "400000\n", f"{group}period_us": "100000\n"}
    assert usable_cores(written(tmp_path, proc__self__cgroup="4:cpu,cpuacct:/docker/a\n", **files)) == 4
    assert usable_cores(written(tmp_path, **{f"{group}quota_us": "-1\n"})) == 16


def test_what_it_may_run_on_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: [3], raising=False)
    assert usable_cores(tmp_path) == 1
    monkeypatch.delattr(psutil.Process, "cpu_affinity")  # macOS
    assert usable_cores(tmp_path) == 16
