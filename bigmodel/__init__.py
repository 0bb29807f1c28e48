"""bigmodel: plan, train, account for and shrink big models under a compute budget.

Importing the package imports nothing heavy; import the module you need: `from bigmodel import train`.
The order to read the code in is the order of the layout in README.md.

Where there is no accelerator, JAX is kept to the CPU unless JAX_PLATFORMS says otherwise: compilers for TPUs
and GPUs (`pip install -e '.[plan]'`) would else look for their chips when JAX starts, which takes seconds
and prints their complaints. So import the package before JAX.
"""

from __future__ import annotations

import os

__version__ = "0.1.0"

ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")


def has_accelerator() -> bool:
    """True if this machine shows the device file of a GPU or a TPU."""
    return any(map(os.path.exists, ACCELERATORS))


def keep_to_cpu() -> None:
    """Keeps JAX to the CPU; has no effect after JAX has been imported."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


if not has_accelerator():
    keep_to_cpu()
