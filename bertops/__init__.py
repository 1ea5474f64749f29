"""Fused PyTorch kernels for distilling and early-exiting BERT-like encoders."""

from bertops import nn
from bertops._backend import use_impl
from bertops.distill.capture import capture
from bertops.ops.attention import attention
from bertops.ops.attention_with_scores import attention_with_scores

__version__ = "0.1.0"

__all__ = ["attention", "attention_with_scores", "capture", "nn", "use_impl"]
