"""Statistics and gradient norms of log-probs at the head of a language model: hidden states in, no logits in memory.

Two ops, `linear_logprob_stats` and `head_grad_norms`. Both are built of the passes of `logprob_stats` over slabs of
logits (``_tiles``, ``_passes``, ``_merge``), so that neither has kernels of its own.
"""

from snr_kernels.lm_head.head_grad_norms import head_grad_norms as head_grad_norms
from snr_kernels.lm_head.linear_logprob_stats import linear_logprob_stats as linear_logprob_stats
from snr_kernels.lm_head.reference import head_grad_norms_reference as head_grad_norms_reference
from snr_kernels.lm_head.reference import linear_logprob_stats_reference as linear_logprob_stats_reference
from snr_kernels.lm_head.results import HeadGradNorms as HeadGradNorms
