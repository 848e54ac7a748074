"""The sum over the GPUs of one host, of arrays so small that a collective is all latency."""

from pallas_kernels.all_reduce.api import all_reduce
from pallas_kernels.all_reduce.workspace import Workspace, make_workspace, why_no_workspace

__all__ = ["Workspace", "all_reduce", "make_workspace", "why_no_workspace"]
