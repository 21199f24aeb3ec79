"""torch's own transformer layers as they are traced.

Padded rows. Where no gradients are recorded, ``nn.TransformerEncoder`` computes on nested tensors, which have no such
rows; at the end they become zeros, before the final norm. Nested tensors cannot be traced. So the encoder is traced as
it computes with gradients, which gives those rows other values that no other row depends on, and they are set to zero
where torch would do so: in evaluation, for a mask that leaves no gaps in any sequence.

Causal masks. The layers look whether a mask that they are given is the causal one, to compute the same faster. That
would depend on the mask's values, which a graph cannot, so the mask is used as it is.

The conditions are those of torch's own source.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import transformer

WHY = "nn.TransformerEncoder gives zeros for padded rows only where no gradients are recorded"


@contextmanager
def traceable(*, nested: bool, happened: Callable[[str], None] | None = None) -> Iterator[None]:
    """Meanwhile no mask's values are looked at, and encoders give what they would without gradients if ``nested``;
    ``happened`` is told when one does."""
    plain = nn.TransformerEncoder.forward
    tracer = threading.get_ident()

    def forward(
        self: nn.TransformerEncoder,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        # Another thread may call an encoder of its own meanwhile, and record gradients.
        recording = threading.get_ident() != tracer and torch.is_grad_enabled()
        if recording or not nested or src_key_padding_mask is None or not _nested(self, src, mask):
            return plain(self, src, mask, src_key_padding_mask, is_causal)
        if happened is not None:
            happened(WHY)
        norm: Any = self.norm
        self.norm = None
        try:
            output = plain(self, src, mask, src_key_padding_mask, is_causal)
        finally:
            self.norm = norm
        output = output.masked_fill(_left_out(self, src_key_padding_mask, src.dtype).unsqueeze(-1), 0.0)
        return output if norm is None else norm(output)

    with (
        patch.object(nn.TransformerEncoder, "forward", forward),
        patch.object(transformer, "_detect_is_causal_mask", _told_causal),
    ):
        yield


def _told_causal(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True


def _nested(encoder: nn.TransformerEncoder, src: Tensor, mask: Tensor | None) -> bool:
    if encoder.layers[0].training or not getattr(encoder, "use_nested_tensor", False):
        return False
    return src.dim() == 3 and mask is None and not torch.is_autocast_enabled()


def _left_out(encoder: nn.TransformerEncoder, padding: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a padding mask ``(batch, length)``, the rows that become zero: none if any sequence has a gap."""
    canonical = functional._canonical_mask(padding, "src_key_padding_mask", None, "mask", dtype)
    assert canonical is not None
    kept = canonical.logical_not()
    if not getattr(encoder, "mask_check", True):
        return kept.logical_not()
    without_gaps = (kept[:, :-1] | kept[:, 1:].logical_not()).all()
    return kept.logical_not() & without_gaps
