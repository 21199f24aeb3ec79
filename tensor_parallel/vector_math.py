"""MKL's vector mathematics, used once while one thread runs. Imported for that, before anything computes.

torch computes ``exp``, ``tanh``, ``erf``, ``sqrt``, ``sin``, ``cos``, ``log`` and attention on CPUs with MKL's vector
functions. Their first call in a process, whichever it is, finds out which kernels suit the CPU, and (before MKL 2025)
keeps the answer for all threads in two steps: first the CPU's type, then the column of the kernel tables that it
stands for. A thread that comes between the two takes the type for the column: on CPUs with AVX-512 that is a kernel of
low accuracy, off by up to 3e-4 of the value in float32 for that one call. So threads of one process that begin together
(two ranks, or the two halves of one large tensor) compute wrongly once, in about one of a thousand processes. See
https://github.com/pytorch/pytorch/issues/188792.

Python runs a module once, in one thread, while others that import it wait.
"""

import torch

# Of one float32 on the CPU, whatever the defaults are: half precision and other devices do not come by MKL.
torch.exp(torch.zeros(1, dtype=torch.float32, device="cpu"))
