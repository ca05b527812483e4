"""The noise of a batch gradient: its moments, their averages, and the hooks on a training loop that measure them."""

from snr_optim.noise.accumulation import AccumulationSource as AccumulationSource
from snr_optim.noise.averages import MomentAverages as MomentAverages
from snr_optim.noise.moments import GradientMoments as GradientMoments
from snr_optim.noise.norms import AdamNorm as AdamNorm
from snr_optim.noise.norms import Norm as Norm
from snr_optim.noise.norms import euclidean as euclidean
