"""What some tests need of the machine beside the packages, and what is said where it is missing."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from browser import NAMES, chromium

from iql_plugins.training.gradients import compiler_available

#: Memory and processes are measured by files that Linux alone has: macOS and Windows skip these.
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads memory or processes from /proc, which Linux alone has"
)

#: The package itself trains without one, uncompiled.
needs_compiler = pytest.mark.skipif(
    not compiler_available(torch.device("cpu")), reason="compiles, and there is no C++ compiler on the path"
)

#: Builds of torch for x86 have it; whether it is the faster one here does not matter to results.
needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="multiplies by oneDNN, which this build of torch lacks"
)

#: Processes talk to each other by it on a CPU.
needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="trains by several processes, and this build of torch has no gloo, by which CPUs talk",
)

OTHERS = Path(__file__).parents[2] / "shared" / "data"


def data_of_others(name: str) -> Path:
    """A dataset that another project made; who has only the repository skips what reads it.

    The project trains on data of its own (``pendulum-v1-sac``) for the same questions.
    """
    path = OTHERS / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{name}.npz is another project's, and kept beside the repository, in ../shared/data, not in it")
    return path


def browser_program() -> str:
    """Chromium; who has none skips what looks at pages, but for :file:`.ci/run`, which installs one."""
    program = chromium()
    if program is None:
        reason = f"looks at a page in Chromium, and none of {', '.join(NAMES)} is on the path"
        if "IQL_PLUGINS_CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    return program
