"""The unsharded model's answer, from `transformers` in a process of its own: what the demo compares with.

``python -m coordinator.cli.reference MODEL_DIRECTORY INPUTS.npz OUTPUTS.npz``
"""

from __future__ import annotations

import sys

import numpy as np


def main(directory: str, inputs: str, outputs: str) -> None:
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    model = AutoModel.from_pretrained(directory).eval()
    arrays = {name: torch.from_numpy(array) for name, array in np.load(inputs).items()}
    with torch.inference_mode():
        hidden = model(**arrays).last_hidden_state
    np.savez(outputs, last_hidden_state=hidden.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
