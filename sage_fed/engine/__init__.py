"""One model on one device: load, KV cache, ragged prefill and decode, sampling.

The only part that knows torch. `load_engine` builds an `Engine`; `locate` finds or downloads
a checkpoint, so that its tokenizer can be read from the same directory.
"""

from sage_fed.engine.checkpoint import locate
from sage_fed.engine.configuration import ModelSpec, read_spec
from sage_fed.engine.engine import Engine, Generated, generate
from sage_fed.engine.load import EngineOptions, load_engine
from sage_fed.engine.machine import (
    DeviceDescription,
    begin_host_peak,
    describe_device,
    device_at_hand,
    host_peak_bytes,
    memory_used_bytes,
    set_cpu_threads,
)
from sage_fed.engine.precision import PRECISIONS, read_bandwidth_bytes_per_s
from sage_fed.engine.random_checkpoint import (
    SHAPES,
    WEIGHT_TYPES,
    CheckpointPlan,
    check_destination,
    free_bytes,
    plan_checkpoint,
    write_checkpoint,
)

__all__ = [
    "PRECISIONS",
    "SHAPES",
    "WEIGHT_TYPES",
    "CheckpointPlan",
    "DeviceDescription",
    "Engine",
    "EngineOptions",
    "Generated",
    "ModelSpec",
    "begin_host_peak",
    "check_destination",
    "describe_device",
    "device_at_hand",
    "free_bytes",
    "generate",
    "host_peak_bytes",
    "load_engine",
    "locate",
    "memory_used_bytes",
    "plan_checkpoint",
    "read_bandwidth_bytes_per_s",
    "read_spec",
    "set_cpu_threads",
    "write_checkpoint",
]
