"""Stable reinforcement learning of language models, by measuring gradients instead of guessing.

OBLR-PO (arXiv 2511.23310): a learning rate set by gradient noise, a variance-optimal unbiased baseline, and the
per-sample gradient norms that the baseline weighs rewards with. The ops underneath are a package of their own,
``snr_kernels``; those that users call are here too. Neither triton nor an integration is imported.
"""

from snr_kernels import (
    HeadGradNorms,
    LogprobStats,
    head_grad_norms,
    linear_grad_norms,
    linear_logprob_stats,
    logprob_stats,
)
from snr_optim.baseline import GradWeightedBaseline
from snr_optim.causal_lm import model_logprob_stats
from snr_optim.grad_norms import PerSampleGradNorms, logit_grad_norms, per_sample_grad_norms_func
from snr_optim.noise import AccumulationSource, GradientMoments
from snr_optim.scheduler import SNRAdaptiveLR

__all__ = [
    "AccumulationSource",
    "GradWeightedBaseline",
    "GradientMoments",
    "HeadGradNorms",
    "LogprobStats",
    "PerSampleGradNorms",
    "SNRAdaptiveLR",
    "head_grad_norms",
    "linear_grad_norms",
    "linear_logprob_stats",
    "logit_grad_norms",
    "logprob_stats",
    "model_logprob_stats",
    "per_sample_grad_norms_func",
]

__version__ = "0.1.0"
