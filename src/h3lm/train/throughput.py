"""How much of the hardware a run uses."""

import re

import torch
from torch import nn

from h3lm.layers import H3, CausalAttention

# Dense bfloat16 peak of a GPU, TFLOP/s, by words of its name. Source: NVIDIA's data sheets.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "4090": 165.0,
}
FORMULA = (
    "operations of a token: 6 N + 6 L d per attention layer + 3 d (2 taps + 7 head_dim d_state) "
    "per H3 layer; N parameters, L block_length, d hidden_size; recomputation is not counted"
)


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 operations a second that a device can do at most, if known."""
    if device.type != "cuda":
        return None
    name = set(re.split(r"[\s-]", torch.cuda.get_device_name(device)))
    found = (rate for words, rate in PEAK_TFLOPS.items() if name.issuperset(words.split()))
    return next((rate * 1e12 for rate in found), None)


def flops_per_token(model: nn.Module, length: int) -> float:
    """Operations that training on one token takes, forward and backward.

    6 for each parameter (a tied head counts once, with the embedding that costs nothing); scores
    and values of causal attention, 2 L d forward on average; of H3's recurrences, by definition,
    2 for each tap of each channel of the shift, and 14 for each complex mode (half of d_state) of
    each of the d head_dim channels of the diagonal SSM. Backward is twice forward.

    Args:
        model: The model.
        length: L, length of a sequence.
    """
    forward = 2.0 * sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, CausalAttention):
            forward += 2.0 * length * module.d_model
        elif isinstance(module, H3):
            forward += 2.0 * module.d_model * module.shift_ssm.d_state
            forward += 7.0 * module.d_model * module.head_dim * module.d_state
    return 3.0 * forward
