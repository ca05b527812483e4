"""Stable reinforcement learning of language models, by measuring gradients instead of guessing.

The learning rate from the signal and noise of the batch gradient (:class:`SNRAdaptiveLR`), the
variance-optimal unbiased baseline (:class:`GradWeightedBaseline`), and the statistics under both.
"""

from snr_optim.baseline import GradWeightedBaseline as GradWeightedBaseline
from snr_optim.causal_lm import model_logprob_stats as model_logprob_stats
from snr_optim.moments import GradientMoments as GradientMoments
from snr_optim.per_sample import PerSampleGradNorms as PerSampleGradNorms
from snr_optim.per_sample import logit_grad_norms as logit_grad_norms
from snr_optim.per_sample import per_sample_grad_norms_func as per_sample_grad_norms_func
from snr_optim.scheduler import SNRAdaptiveLR as SNRAdaptiveLR
from snr_optim.sources import AccumulationSource as AccumulationSource

__version__ = "0.1.0"
