"""Squared gradient norms of single sequences, ``||grad log pi(o_i)||^2``: the weights of the baseline."""

from snr_optim.per_sample.oracle import per_sample_grad_norms_func as per_sample_grad_norms_func
from snr_optim.per_sample.proxies import logit_grad_norms as logit_grad_norms
from snr_optim.per_sample.recorder import PerSampleGradNorms as PerSampleGradNorms
from snr_optim.per_sample.rules import by_autograd as by_autograd
