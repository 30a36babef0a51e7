"""Which numbers a processor or GPU multiplies fastest."""

from typing import Any

import torch

from crosslm.sections.models import FitConfig


def fast_dtype(device: str) -> torch.dtype:
    """What ``dtype = "auto"`` means on a device: bfloat16 where it multiplies in it, and float32 elsewhere."""
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.startswith("mps"):  # whose sums have not been looked at
        return torch.float32
    # older torch cannot say; elsewhere than on x86 the names are others
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    multiplies = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if multiplies else torch.float32


def fit_dtype(config: FitConfig, device: str) -> torch.dtype:
    """In which numbers an SLM's training multiplies on a device."""
    return fast_dtype(device) if config.dtype == "auto" else torch.float32
