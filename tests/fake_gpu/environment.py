"""Environment of a `vllm serve` of the CUDA wheel that takes this machine for one with an H100."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = {
    "vllm": ("0.33.0", ""),
    "fake_gpu": ("0", "[vllm.platform_plugins]\nh100 = tests.fake_gpu.h100:register\n"),
}


def simulated_h100(site: Path) -> dict[str, str]:
    """Variables that are added to this process's own, whose PYTHONPATH has the wheel and Triton. Writes into `site`
    what Python knows of installed packages."""
    for name, (version, entry_points) in DISTRIBUTIONS.items():
        directory = site / f"{name}-{version}.dist-info"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (directory / "entry_points.txt").write_text(entry_points)
    return {
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT), os.environ["PYTHONPATH"]]),
        "TRITON_INTERPRET": "1",
        "VLLM_CACHE_ROOT": str(site / "cache"),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
