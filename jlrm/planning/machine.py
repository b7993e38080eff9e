"""What the devices at hand can do, measured now: rate of matrix products, bandwidth, memory used.

No data sheet enters: a share of these limits is a share of what this machine reached.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jlrm.runtime.mesh import Layout, training_layout


def limits(mesh: Mesh, dtype: str) -> dict[str, Any]:
    """Return what the devices are and what they can do together, as measured now."""
    layout, device = training_layout(mesh), mesh.devices.flat[0]
    size, flops_rate = matmul_rate(layout, dtype)
    return {
        "matmul_flops_per_second": flops_rate,
        "matmul_size": size,
        "dtype": dtype,
        "read_bytes_per_second": read_rate(layout),
        "note": "rates are measured here, over all devices; they are no data-sheet values",
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": mesh.size,
        "num_processes": jax.process_count(),
        "jax": jax.__version__,
    }


def describe(limits: dict[str, Any]) -> str:
    """Return the limits as a line of text."""
    return (
        f"{limits['num_devices']} x {limits['device_kind']} ({limits['platform']}), "
        f"{limits['num_processes']} process(es), jax {limits['jax']}; "
        f"measured, no data-sheet values: {limits['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s "
        f"({limits['dtype']} products of {limits['matmul_size']}), "
        f"{limits['read_bytes_per_second'] / 1e9:.3g} GB/s"
    )


def matmul_rate(layout: Layout, dtype: str) -> tuple[int, float]:
    """Return the size of the fastest square product in `dtype`, and all devices' FLOPs a second.

    The sizes are fixed: processes that chose by their own clocks would run different programs.
    """
    is_cpu = layout.platform == "cpu"
    sizes, num_products = ((256, 512, 1024), 2) if is_cpu else ((1024, 2048, 4096, 8192), 16)
    place = layout.activation("B - -")

    @jax.jit
    def multiply(x: Float[Array, "B N N"], y: Float[Array, "B N N"]) -> Float[Array, "B N N"]:
        return jax.lax.fori_loop(0, num_products, lambda _, x: x @ y, x)

    rates = []
    for size in sizes:
        shape = layout.mesh.size, size, size
        x = jax.jit(partial(jnp.full, shape, 1 / size, dtype), out_shardings=place)()
        flops = 2 * num_products * layout.mesh.size * size**3
        rates.append((flops / _best_seconds(multiply, x, x), size))
    rate, size = max(rates)
    return size, rate


def read_rate(layout: Layout) -> float:
    """Return the bytes a second that all devices together read, of arrays too big for caches."""
    num_devices, is_cpu = layout.mesh.size, layout.platform == "cpu"
    num_bytes = 2**28 // num_devices if is_cpu else 2**31  # CPU devices share one memory
    make = partial(jnp.ones, (num_devices, num_bytes // 4), jnp.float32)
    x = jax.jit(make, out_shardings=layout.activation("B -"))()
    return x.nbytes / _best_seconds(jax.jit(partial(jnp.sum, axis=1)), x)


def _best_seconds(program: Callable[..., Any], *args: Any, repeats: int = 3) -> float:
    jax.block_until_ready(program(*args))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(program(*args))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def peak_bytes(mesh: Mesh) -> int:
    """Return the most memory used so far: by a device, or by the process if devices report none."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    peaks = [of_device["peak_bytes_in_use"] for of_device in stats if of_device]
    if peaks:
        return max(peaks)
    import resource  # which Windows does not have

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_limit(device: Any) -> int:
    """Return the bytes that programs may use on a device; CPUs share what the machine has."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return _of_machine("MemTotal") // jax.local_device_count()


def device_free(device: Any) -> int:
    """Return the bytes of a device that are not in use now, by this process or another."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return _of_machine("MemAvailable") // jax.local_device_count()


def _of_machine(name: str) -> int:
    """Return a figure of Linux's /proc/meminfo, or all memory where there is no such file."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
