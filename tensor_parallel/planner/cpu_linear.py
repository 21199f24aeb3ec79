"""``aten.linear`` on a CPU with few threads: for a moderate number of rows, the weight as the product's first factor.

``x @ W.t()`` makes MKL copy the whole weight into its own layout at every call, which for 8 to 128 rows costs as much
as the arithmetic. ``W @ x.t()`` reads the weight as it lies; what is transposed instead are the activations, which are
small. Measured by ``python -m tests.benchmarks linear``; for fewer rows than :data:`FEWEST`, and for more than
:data:`MOST`, the usual way is the faster one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FEWEST = 8
"""Rows; MKL has kernels of its own for fewer."""
MOST = {1: 128, 2: 24}
"""Rows, by the number of threads: several threads copy the weight together."""
SMALLEST = 1 << 20
"""Elements of the weight: a smaller one is copied within a core's cache, which costs less than the transpositions."""

_linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = torch._C._nn.linear
_available = torch.backends.mkl.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x (..., K)`` times ``weight (N, K)`` transposed, plus ``bias (N,)``: ``(..., N)``, contiguous."""
    if x.numel() < FEWEST * weight.shape[-1] or not _pays(x, weight):
        return _linear(x, weight, bias)
    product = _weight_first(x, weight).t().contiguous()
    if bias is not None:
        product.add_(bias)
    return product.view(*x.shape[:-1], -1)


def linear_features_first(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`linear` whose result may be laid out by features, for those that do not mind: elementwise operations
    and, after them, another :func:`linear`, which then transposes nothing."""
    if x.numel() < FEWEST * weight.shape[-1] or not _pays(x, weight):
        return _linear(x, weight, bias)
    product = _weight_first(x, weight)
    if bias is not None:
        product.add_(bias.unsqueeze(1))
    laid_out: Tensor = product.t().unflatten(0, x.shape[:-1])
    return laid_out


def _pays(x: Tensor, weight: Tensor) -> bool:
    """For at least FEWEST rows."""
    if weight.numel() < SMALLEST or not _available:
        return False
    if weight.dtype != torch.float32 or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    few = x.numel() // weight.shape[-1] <= MOST.get(torch.get_num_threads(), 0)
    return few and weight.ndim == 2 and weight.is_contiguous()


def _weight_first(x: Tensor, weight: Tensor) -> Tensor:
    """The product with the features first: ``(N, rows)``."""
    return torch.mm(weight, x.reshape(-1, weight.shape[1]).t().contiguous())
