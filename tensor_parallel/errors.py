"""Every error this package raises on purpose.

One hierarchy, so that a server maps it to status codes in one table. Errors about arguments are also ``ValueError``s
and errors about the state of the group are also ``RuntimeError``s: code that knows nothing of this package still
catches them sensibly.
"""


class TensorParallelError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(TensorParallelError, ValueError):
    """What says where this process stands in its group, or how it reaches it, is missing, malformed or inconsistent."""


class ShapeError(TensorParallelError, ValueError):
    """A tensor's shape or dtype does not fit the layer or collective it was given to; the message names both."""


class NotInitialized(TensorParallelError, RuntimeError):
    """The process has no configuration yet: :func:`init_tensor_parallel` was not called."""


class GroupUnbound(TensorParallelError, RuntimeError):
    """A collective was asked of a group that has no backend: not formed yet, or torn down after a failure."""


class CollectiveError(TensorParallelError, RuntimeError):
    """A collective did not complete. The group it ran on is finished: drop it and form another."""


class CollectiveAborted(CollectiveError):
    """The collective was ended on purpose, by :meth:`Backend.abort` here or on a peer."""


class CollectiveTimeout(CollectiveError):
    """A peer did not take part in the collective within the group's timeout."""


class CollectiveMismatch(CollectiveError):
    """The ranks called different collectives, or the same one with different shapes or dtypes."""


class AbortStuck(CollectiveError):
    """A device did not let go of an aborted collective. Only ending the process frees it."""


class PeerLost(CollectiveError):
    """A peer died or closed its connection while the group needed it."""


class PlanError(TensorParallelError):
    """No provably correct plan could be made for a model."""


class NoGraph(PlanError):
    """No graph can be planned for these calls of a module; its own code can run them."""


class NotPortable(TensorParallelError):
    """A plan cannot be handed to another process, or what was handed over is no plan for this one; says why."""


class CannotCompile(TensorParallelError, RuntimeError):
    """``execution="compile"`` cannot be had: for this model, or on this machine; the message says why."""


class CheckpointError(TensorParallelError, ValueError):
    """A checkpoint is missing, truncated, mis-shaped or unsafe; the message names the file or tensor."""


class InvalidInput(TensorParallelError, ValueError):
    """An input of a forward is unknown, missing, or of the wrong dtype, shape or range; the message names it."""


class DoesNotFit(TensorParallelError, RuntimeError):
    """A rank's share of a model is larger than the memory it may use."""


class AccessDenied(TensorParallelError, PermissionError):
    """A path lies outside the model root, or a factory is not on the list of those allowed."""


class LoadCancelled(TensorParallelError):
    """A load was cancelled by its caller; everything it had read is freed."""


# torch's CPU allocator raises a plain RuntimeError.
_NO_MEMORY = (
    *("can't allocate memory", "not enough memory", "cannot allocate memory", "CUDA out of memory"),
    *("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)


def out_of_memory(error: BaseException) -> bool:
    """Whether the host or the device had no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


def device_failed(error: BaseException) -> bool:
    """Whether a GPU reported an error other than too little memory. Most of them (a failed assertion, a bad address)
    leave the process without that GPU for good: whatever it computes next fails alike."""
    if out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "AcceleratorError" or str(error).startswith(("CUDA error", "CUDA driver error"))
