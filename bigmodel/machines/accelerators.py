"""Looks for an accelerator. This file imports no JAX and must run before JAX is imported."""

from __future__ import annotations

import os

FILES = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")


def found() -> bool:
    """True if this machine has the device file of a GPU or a TPU."""
    return any(map(os.path.exists, FILES))


def keep_to_cpu() -> None:
    """Keeps JAX to the CPU unless JAX_PLATFORMS says otherwise; has no effect after JAX was imported.

    Compilers for TPUs and GPUs (`pip install -e '.[plan]'`) would otherwise look for their chips when JAX
    starts, which takes seconds and prints their complaints.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
