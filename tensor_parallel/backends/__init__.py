"""Ways for the ranks of one generation to reach each other; :func:`form_backend` makes the right one.

===========  ==============================  =======================================================================
kind         module                          for
===========  ==============================  =======================================================================
``"gloo"``   :mod:`.gloo`                    CPU ranks on any number of hosts, over TCP
``"shm"``    :mod:`.shm`                     CPU ranks on one host, through shared memory
``"nccl"``   :mod:`.nccl`                    one NVIDIA GPU per rank
``"auto"``                                   ``nccl`` on CUDA; on CPU ``shm`` (compiled, one host), else ``gloo``
===========  ==============================  =======================================================================

``gloo`` and ``shm`` asked for on CUDA copy through the host (:mod:`.staged`): for ranks that share a GPU.
"""

from tensor_parallel.backends.form import form_backend

__all__ = ["form_backend"]
