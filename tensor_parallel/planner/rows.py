"""Operations that treat each row alone: each rank can run them on its own rows."""

from __future__ import annotations

from tensor_parallel.planner import runtime
from tensor_parallel.planner.program import Ref, Step
from tensor_parallel.planner.rules.pointwise import BINARY, UNARY

_POINTWISE = frozenset(UNARY) | frozenset(BINARY)
_NORMS = ("layer_norm", "rms_norm")
_ALONG = ("softmax", "log_softmax", "_softmax", "_log_softmax")
_REDUCTIONS = ("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "logsumexp")


def treats_rows_alone(step: Step, dim: int, ndim: int) -> bool:
    """Whether an operation's result at each index along ``dim`` (from the right) depends on the operands there only."""
    if step.fn is runtime.dropout:
        return ndim + dim >= 0
    schema = getattr(step.fn, "_schema", None)
    if schema is None or ndim + dim < 0:
        return False
    name = schema.name.split("::")[1]
    bound = dict(zip([a.name for a in schema.arguments], step.args, strict=False)) | step.kwargs
    if any(isinstance(a, (list, tuple)) and any(isinstance(i, Ref) for i in a) for a in bound.values()):
        return False
    if name in _POINTWISE or name == "dropout":
        return "Tensor" in str(schema.returns[0].type)
    if name in _NORMS:
        return len(bound["normalized_shape"]) < -dim
    if name in _ALONG:
        return bool(bound["dim"] % ndim != ndim + dim)
    if name in _REDUCTIONS:
        dims = bound.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        return bool(dims and bound.get("keepdim") is True and all(d % ndim != ndim + dim for d in dims))
    return False
