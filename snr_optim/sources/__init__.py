"""Where the moments of a batch gradient come from: hooks on a training loop, each yielding ``GradientMoments``."""

from snr_optim.sources.accumulation import AccumulationSource as AccumulationSource
