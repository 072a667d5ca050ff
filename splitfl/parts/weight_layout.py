"""How the weights of frozen linear layers lie in memory, so that a CPU reads them fast for a token at a time.

``nn.Linear`` holds ``(out, in)`` row by row. The product with a few rows is bound by how fast the weights are read, and MKL
reads rows of up to some 2048 elements in fp32 at well under the memory's speed. Held column by column, the same matrix takes .5
to .9 of the time for one to three rows, the less the shorter its rows are, and as long as before for four and more. Longer rows
gain nothing; in bfloat16, and going back, few rows take longer (measured on an AMD EPYC with torch 2.13).
"""

from __future__ import annotations

import threading

import torch
from torch import nn

__all__ = ["lay_out_for_decoding"]

#: Elements of the longest row that is worth it.
_LONGEST = 2048

#: Several threads may begin to generate with one model.
_lock = threading.Lock()


def lay_out_for_decoding(model: nn.Module) -> None:
    """Hold the frozen fp32 weights of ``model``'s linear layers on a CPU column by column; nothing else about them changes. What
    trains stays as it is, for its optimizer and its gradients, and so does what is an embedding too. Layers that have been laid
    out cost a look. A weight that lay in a mapped checkpoint has memory of its own then.
    """
    if not torch.backends.mkl.is_available():
        return
    with _lock:
        embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        for module in model.modules():
            if not isinstance(module, nn.Linear):
                continue
            weight = module.weight
            if weight.requires_grad or id(weight) in embedded or weight.device.type != "cpu" or weight.dtype != torch.float32:
                continue
            if module.in_features <= _LONGEST and weight.is_contiguous():
                weight.data = weight.data.t().contiguous().t()
