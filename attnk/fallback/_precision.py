"""How exact PyTorch's matrix products are at the moment."""

import torch


def multiplies_exactly() -> bool:
    """Whether products of float32 are as precise as sums, so that a product may stand for a sum."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # settings of the newer torch.backends.*.fp32_precision, which the older question cannot tell
        return False
