"""Tensor parallelism for any ``nn.Module``: sharded layers, differentiable collectives, whole models."""

from typing import TYPE_CHECKING, Any

from tensor_parallel.collectives import (
    all_gather_concat,
    all_reduce_sum,
    broadcast_tensor,
    copy_to_ranks,
    reduce_scatter_sum,
    scatter,
    synchronize_across_ranks,
    take_slice,
)
from tensor_parallel.config import (
    TensorParallelConfig,
    destroy_tensor_parallel,
    get_tensor_parallel_config,
    init_tensor_parallel,
)
from tensor_parallel.embedding import VocabParallelEmbedding
from tensor_parallel.errors import TensorParallelError
from tensor_parallel.group import Group, default_group
from tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

if TYPE_CHECKING:
    from tensor_parallel.wrapper import DistributedModelWrapper

__all__ = [
    "ColumnParallelLinear",
    "DistributedModelWrapper",
    "Group",
    "RowParallelLinear",
    "TensorParallelConfig",
    "TensorParallelError",
    "VocabParallelEmbedding",
    "all_gather_concat",
    "all_reduce_sum",
    "broadcast_tensor",
    "copy_to_ranks",
    "default_group",
    "destroy_tensor_parallel",
    "get_tensor_parallel_config",
    "init_tensor_parallel",
    "reduce_scatter_sum",
    "scatter",
    "synchronize_across_ranks",
    "take_slice",
]


def __getattr__(name: str) -> Any:
    """The wrapper brings ``torch.export`` with it: only those who use it wait for that."""
    if name == "DistributedModelWrapper":
        from tensor_parallel.wrapper import DistributedModelWrapper

        return DistributedModelWrapper
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
