"""Weights of matrix products laid out once for this CPU's vector units.

`torch.nn.Linear` hands its weights over as they lie, to be laid out at every call in bfloat16, and not at all in
float32. An encoder that only encodes can have it done once: at 25 tokens a product then takes two thirds of the time,
at 800 five sixths of it (384 x 1536, one thread, AVX512; held to AVX2, four fifths and all of it). `torch.compile`
does the same where it freezes a model, but for minutes and with a C++ compiler.
"""

from __future__ import annotations

import torch
from torch import nn

TOKENS = 32
"""The rows that the layout is made for; it is as good for 8 as for 800, and worse for either where made for one."""
STEPS = 5
"""oneDNN makes a program for each number of rows, which takes longer than to run it, and 100 kB: so rows are padded to
one of 2⁴ numbers between each power of two and the next, by 3% on average; from 32 on, so that a lone text is not."""


class PackedLinear(nn.Module):
    """What a Linear computes, in `dtype`, from packed weights. It can be neither trained nor saved."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        # Not parameters: nothing may move or cast them. The names are Linear's, of which some models ask the type.
        self.weight = torch.ops.mkldnn._reorder_linear_weight.default(linear.weight.detach().to(dtype), TOKENS)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        rows_NI = states.to(self.weight.dtype).reshape(-1, states.shape[-1])
        N, step = len(rows_NI), 1 << len(rows_NI).bit_length() >> STEPS
        if step > 1 and N % step:
            rows_NI = nn.functional.pad(rows_NI, (0, 0, 0, step - N % step))
        result = torch.ops.mkldnn._linear_pointwise.default(rows_NI, self.weight, self.bias, "none", [], "")
        return result[:N].view(*states.shape[:-1], -1)


def pack_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Put a PackedLinear in the place of each Linear of `model`, on a CPU that oneDNN packs this dtype for."""
    packs = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's
    if not packs or "AVX" not in torch.backends.cpu.get_cpu_capability():
        return
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:  # its subclasses may do something else
                setattr(module, name, PackedLinear(child, dtype))
