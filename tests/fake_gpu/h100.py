"""A simulated H100: a vLLM plugin that makes `vllm serve` of the CUDA wheel take a CPU for one.

vLLM calls its platform plugins in each of its processes, before it looks for Triton. From then on torch.cuda reports a
device, streams and events do nothing, and tensors of the device are in the CPU's memory.
"""

import contextlib
import sys
import types
from collections import defaultdict
from functools import cache
from typing import Any

import torch

NAME, CAPABILITY, MEMORY_BYTES = "NVIDIA H100 80GB HBM3", (9, 0), 80 << 30
PROPERTIES = types.SimpleNamespace(
    name=NAME, major=9, minor=0, total_memory=MEMORY_BYTES, multi_processor_count=132, warp_size=32, is_integrated=False
)
LIBRARIES = ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa2_C")
"""Libraries that the CUDA wheel needs to start. They depend on CUDA's; their contents are not called."""
ASKED = ("cutlass_scaled_mm_supports_fp8", "cutlass_scaled_mm_supports_block_fp8", "cutlass_group_gemm_supported")
"""Their functions that are called while vLLM is imported; they return False."""
OPERATORS = torch.library.Library("_C", "FRAGMENT")


class Event:
    """An event, or a stream, of a device on which everything has happened already."""

    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def nothing(self, *args: Any) -> None:
        pass

    record = synchronize = wait = wait_stream = wait_event = nothing

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or Event()


def saying(value: Any) -> Any:
    """A function that always returns this value."""
    return lambda *args, **kwargs: value


@cache
def register() -> str:
    """Replace what needs a device, once per process; vLLM calls this (`vllm.platform_plugins`)."""
    both = {
        "device_count": saying(1),
        "is_available": saying(True),
        "current_stream": saying(Event()),
        "memory_stats": saying(defaultdict(int)),
        **{name: saying(0) for name in ("memory_allocated", "memory_reserved", "max_memory_allocated")},
        **{name: saying(None) for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_stream")},
    }
    cuda = {
        "current_device": saying(0),
        "set_device": saying(None),
        "get_device_properties": saying(PROPERTIES),
        "get_device_capability": saying(CAPABILITY),
        "get_device_name": saying(NAME),
        "stream": saying(contextlib.nullcontext()),
        "Stream": Event,
        "Event": Event,
        "_lazy_init": saying(None),
    }
    torch.cuda.__dict__.update(both | cuda)
    torch.accelerator.__dict__.update(both | {"get_memory_info": saying((MEMORY_BYTES, MEMORY_BYTES))})
    torch.cuda.memory.get_allocator_backend = saying("none")
    torch.Event = torch.Stream = Event
    torch.Tensor.record_stream = saying(None)
    from triton.backends.nvidia.driver import CudaDriver

    CudaDriver.is_active = staticmethod(saying(True))
    for library in LIBRARIES:
        sys.modules.setdefault(library, types.ModuleType(library))
    for question in ASKED:
        OPERATORS.define(f"{question}(int capability) -> bool")
        OPERATORS.impl(question, saying(False), "CompositeExplicitAutograd")
    return "tests.fake_gpu.platform.H100Platform"
