"""Tensor parallelism for any ``nn.Module``: sharded layers, differentiable collectives, whole models.

Names are imported when first used. So a process can set what must be set before torch is imported
(:mod:`tensor_parallel.nccl_environment`), and those who never wrap a model do not wait for ``torch.export``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from tensor_parallel.wrapper import DistributedModelWrapper

_HOMES = {
    "collectives": (
        "all_gather_concat",
        "all_reduce_sum",
        "broadcast_tensor",
        "copy_to_ranks",
        "reduce_scatter_sum",
        "scatter",
        "synchronize_across_ranks",
        "take_slice",
    ),
    "config": (
        "TensorParallelConfig",
        "destroy_tensor_parallel",
        "get_tensor_parallel_config",
        "init_tensor_parallel",
    ),
    "embedding": ("VocabParallelEmbedding",),
    "errors": ("TensorParallelError",),
    "group": ("Group", "default_group"),
    "layers": ("ColumnParallelLinear", "RowParallelLinear"),
    "wrapper": ("DistributedModelWrapper",),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}

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
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
