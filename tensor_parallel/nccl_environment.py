"""What a process must have in its environment before it imports torch, for NCCL to survive a lost peer.

By default torch answers a failed NCCL collective by ending the process, from a watchdog thread. Here the weights are
worth more than the group: whoever manages failures aborts the communicator and forms another (see
:mod:`tensor_parallel.backends.nccl`). This module imports nothing, so that it can be used first.
"""

NCCL_ENVIRONMENT = {
    # The watchdog neither aborts nor ends the process when a collective fails or takes too long.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
    # No recording of the last collectives, which would walk the Python stack at each.
    "TORCH_FR_BUFFER_SIZE": "0",
}
"""Values to put into ``os.environ`` (with ``setdefault``, so that an operator can overrule them)."""
