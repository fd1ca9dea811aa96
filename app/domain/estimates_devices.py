"""Devices that are known by their data sheets, and what a device class is said to reach before it is measured."""

from typing import Final, Literal

from app.domain.frozen import Frozen

MIB: Final = 2**20
#: Of a device: the driver's context and the libraries' workspaces.
CONTEXT_BYTES: Final = 1024 * MIB
#: Share of a device's memory that a run can fill: caching allocators leave holes.
USABLE_SHARE: Final = 0.95


class Rates(Frozen):
    """What a device class reaches: seconds for an operation, for a byte moved, and for a layer's call."""

    seconds_per_flop: float
    seconds_per_byte: float
    seconds_per_call: float  # of one decoder layer, forward or backward, beside its arithmetic


class Device(Frozen):
    """A device class."""

    name: str
    type: Literal["cuda", "cpu"]
    memory_bytes: int | None  # None: not known
    rates: Rates


def _gpu(name: str, memory_mib: int, bf16_tflops: float, gigabytes_per_second: float) -> Device:
    """A GPU by its data sheet (dense bf16), at the share of it that training reaches as a rule."""
    return Device(
        name=name,
        type="cuda",
        memory_bytes=memory_mib * MIB,
        rates=Rates(
            seconds_per_flop=1 / (0.4 * bf16_tflops * 1e12),
            seconds_per_byte=1 / (0.7 * gigabytes_per_second * 1e9),
            seconds_per_call=1e-4,
        ),
    )


#: Memory as the driver reports it, dense bf16 TFLOP/s, memory bandwidth in GB/s.
KNOWN_GPUS: Final = (
    _gpu("NVIDIA L4", 23_034, 121, 300),
    _gpu("NVIDIA A10", 23_028, 125, 600),
    _gpu("NVIDIA GeForce RTX 4090", 24_564, 165, 1_008),
    _gpu("NVIDIA A100-40GB", 40_960, 312, 1_555),
    _gpu("NVIDIA L40S", 46_068, 362, 864),
    _gpu("NVIDIA RTX A6000", 49_140, 155, 768),
    _gpu("NVIDIA H100-80GB", 81_559, 989, 3_350),
    _gpu("NVIDIA A100-80GB", 81_920, 312, 2_039),
    _gpu("NVIDIA H200", 143_771, 989, 4_800),
    _gpu("NVIDIA B200", 183_359, 2_250, 8_000),
    _gpu("AMD Instinct MI300X", 196_592, 1_307, 5_300),
)
#: Where nothing was measured and nobody says what the workers have.
DEFAULT_GPU: Final = "NVIDIA A100-80GB"


def known_gpu(name: str) -> Device:
    """A GPU of the table.

    Raises:
        KeyError: There is none of this name.
    """
    return {gpu.name: gpu for gpu in KNOWN_GPUS}[name]


def cpu(name: str, threads: int) -> Device:
    """A CPU before it is measured: 50 GFLOP/s a thread in float32."""
    return Device(
        name=name,
        type="cpu",
        memory_bytes=None,
        rates=Rates(
            seconds_per_flop=1 / (5e10 * threads), seconds_per_byte=1e-10, seconds_per_call=2e-4
        ),
    )


def usable_bytes(memory_bytes: int) -> int:
    """What a run can have of a device's memory."""
    return int(memory_bytes * USABLE_SHARE) - CONTEXT_BYTES
