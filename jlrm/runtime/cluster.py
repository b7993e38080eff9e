"""The number of this process and of all processes: from flags, the environment or the machine.

Left out: joining the others, and everything after that (hosts.py).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

from jlrm.config import UsageError
from jlrm.runtime import devices, google

MODES = ("auto", "on", "off")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that number this process among the others."""
    group = parser.add_argument_group(
        "several hosts",
        "detected on Cloud TPU, GKE and Slurm, so rarely needed; environment variables in brackets",
    )
    group.add_argument(
        "--distributed",
        choices=MODES,
        default=os.environ.get("JLRM_DISTRIBUTED", "auto"),
        help="off: this process runs alone [JLRM_DISTRIBUTED]",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        default=os.environ.get("JLRM_COORDINATOR", ""),
        help="address of process 0 [JLRM_COORDINATOR]",
    )
    for flag, what in (
        ("num-processes", "number of processes of the run"),
        ("process-id", "number of this process, from 0"),
    ):
        name = f"JLRM_{flag.replace('-', '_').upper()}"
        group.add_argument(f"--{flag}", default=os.environ.get(name, ""), help=f"{what} [{name}]")


def settings(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return the arguments of `jax.distributed.initialize`, or None if this process is alone."""
    if args.distributed not in MODES:  # of the environment
        raise UsageError(f"JLRM_DISTRIBUTED={args.distributed} is none of {', '.join(MODES)}.")
    # Commands that need no device do without JAX where they are alone.
    jax = sys.modules.get("jax")
    if args.distributed == "off" or (jax is not None and jax.distributed.is_initialized()):
        return None
    if args.coordinator:
        try:
            number, total = int(args.process_id), int(args.num_processes)
        except ValueError:
            raise UsageError(
                f"--coordinator {args.coordinator} needs --num-processes and --process-id, got "
                f"{args.num_processes!r} and {args.process_id!r}."
            ) from None
        if ":" not in args.coordinator or not 0 <= number < total:
            raise UsageError(
                f"--coordinator {args.coordinator} --num-processes {total} --process-id {number}: "
                "wanted HOST:PORT and 0 <= process-id < num-processes."
            )
        if total == 1:
            return None
        return {
            "coordinator_address": args.coordinator,
            "num_processes": total,
            "process_id": number,
        }
    if args.num_processes or args.process_id:
        raise UsageError("--num-processes and --process-id need --coordinator HOST:PORT.")
    return {} if args.distributed == "on" or _are_several() else None


def _are_several() -> bool:
    """Return whether the environment, or the metadata of a VM, belong to a run of several hosts."""
    env = os.environ
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in env:
        return True
    if _number_in(env, "MEGASCALE_NUM_SLICES") > 1:
        return True
    if "," in env.get("TPU_WORKER_HOSTNAMES", "") + env.get("TPU_PROCESS_ADDRESSES", ""):
        return True  # GKE
    if not devices.tpu_files() or env.get("TPU_SKIP_MDS_QUERY"):
        return False
    # Slices of one host each are told of each other by their metadata alone.
    return _tpu_vm_workers() > 1 or _number_in(google.tpu_environment(), "MEGASCALE_NUM_SLICES") > 1


def _number_in(settings: Mapping[str, str], name: str) -> int:
    text = settings.get(name, "")
    return int(text) if text.isdigit() else 1


def _tpu_vm_workers() -> int:
    """Return the number of hosts in the slice of a Cloud TPU VM; 1 on other machines."""
    try:
        listed = google.metadata("instance/attributes/worker-network-endpoints", 5.0)
    except (google.Unknown, OSError):  # Colab and Kaggle have the devices, and no such server
        return 1
    return len(listed.split(","))
