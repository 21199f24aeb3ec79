"""The planner: any module sharded automatically, with every step of the division proven.

``make_plan`` traces a model without its weights, propagates ownership through the graph, searches the proven plans for
the cheapest
and verifies the winner. ``instantiate`` builds one rank's module from it.
"""

from tensor_parallel.planner.cost import Network
from tensor_parallel.planner.describe import describe
from tensor_parallel.planner.make import instantiate, make_plan
from tensor_parallel.planner.module import ShardedModule
from tensor_parallel.planner.plan import Collective, InputSpec, OutputSpec, Plan, Reason
from tensor_parallel.planner.shard import Shard

__all__ = [
    "Collective",
    "InputSpec",
    "Network",
    "OutputSpec",
    "Plan",
    "Reason",
    "Shard",
    "ShardedModule",
    "describe",
    "instantiate",
    "make_plan",
]
