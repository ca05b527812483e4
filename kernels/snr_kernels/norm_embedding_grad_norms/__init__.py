"""Squared gradient norms, per sequence, of the scale of a normalization layer and of an embedding."""

from snr_kernels.norm_embedding_grad_norms._torch import normalised as normalised
from snr_kernels.norm_embedding_grad_norms.op import embedding_grad_norms as embedding_grad_norms
from snr_kernels.norm_embedding_grad_norms.op import normalization_grad_norms as normalization_grad_norms
from snr_kernels.norm_embedding_grad_norms.reference import (
    embedding_grad_norms_reference as embedding_grad_norms_reference,
)
from snr_kernels.norm_embedding_grad_norms.reference import (
    normalization_grad_norms_reference as normalization_grad_norms_reference,
)
