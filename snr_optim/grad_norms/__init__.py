"""Squared gradient norms of single sequences, ``||grad log pi(o_i)||^2``: they are the weights of the baseline."""

from snr_optim.grad_norms.functional import per_sample_grad_norms_func as per_sample_grad_norms_func
from snr_optim.grad_norms.per_sample import PerSampleGradNorms as PerSampleGradNorms
from snr_optim.grad_norms.proxies import chosen_token_grad_norms as chosen_token_grad_norms
from snr_optim.grad_norms.proxies import logit_grad_norms as logit_grad_norms
from snr_optim.grad_norms.rules import by_autograd as by_autograd
