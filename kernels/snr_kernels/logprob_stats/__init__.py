"""Logits to the log-prob of the label and what else one pass over the vocabulary can tell, with its backward pass."""

from snr_kernels.logprob_stats.op import logprob_stats as logprob_stats
from snr_kernels.logprob_stats.reference import logprob_stats_reference as logprob_stats_reference
from snr_kernels.logprob_stats.results import IGNORE_INDEX as IGNORE_INDEX
from snr_kernels.logprob_stats.results import LogprobStats as LogprobStats
