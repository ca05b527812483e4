"""Ops for the log-probs of language models and for per-sample gradient norms: Triton on GPUs, torch everywhere else.

Tensors in, tensors out; torch is all they need, and nothing of ``snr_optim``. Each op has a folder: its door, its two
paths, and a float64 reference, which tests hold both paths to.
"""

from snr_kernels.linear_grad_norms import linear_grad_norms, linear_grad_norms_reference
from snr_kernels.lm_head import (
    HeadGradNorms,
    head_grad_norms,
    head_grad_norms_reference,
    linear_logprob_stats,
    linear_logprob_stats_reference,
)
from snr_kernels.logprob_stats import IGNORE_INDEX, LogprobStats, logprob_stats, logprob_stats_reference
from snr_kernels.norm_embedding_grad_norms import (
    embedding_grad_norms,
    embedding_grad_norms_reference,
    normalization_grad_norms,
    normalization_grad_norms_reference,
)
from snr_kernels.segments import Segments

__all__ = [
    "IGNORE_INDEX",
    "HeadGradNorms",
    "LogprobStats",
    "Segments",
    "embedding_grad_norms",
    "embedding_grad_norms_reference",
    "head_grad_norms",
    "head_grad_norms_reference",
    "linear_grad_norms",
    "linear_grad_norms_reference",
    "linear_logprob_stats",
    "linear_logprob_stats_reference",
    "logprob_stats",
    "logprob_stats_reference",
    "normalization_grad_norms",
    "normalization_grad_norms_reference",
]
