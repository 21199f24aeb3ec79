"""Keeps a node's processes running: daemons pinned to their GPUs and, for a local cluster, the coordinator.

A dead child is replaced at once; only one that never became ready is waited with. A child that stops answering is
killed and replaced. No child outlives the supervisor, however that ends.
"""

from coordinator.supervisor.child import Child, ChildSpec
from coordinator.supervisor.loop import StartError, Supervisor

__all__ = ["Child", "ChildSpec", "StartError", "Supervisor"]
