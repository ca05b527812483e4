"""Activations and output gradients of a linear layer to the squared norm of its weight gradient, per sequence.

``||A_s^T G_s||_F^2`` without the product in memory: by Gram matrices where sequences are short, by tiles of the product
where they are long.
"""

from snr_kernels.linear_grad_norms.op import Method as Method
from snr_kernels.linear_grad_norms.op import linear_grad_norms as linear_grad_norms
from snr_kernels.linear_grad_norms.reference import linear_grad_norms_reference as linear_grad_norms_reference
