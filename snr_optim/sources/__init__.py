"""Where the moments of a batch gradient come from: hooks on a training loop, each yielding ``GradientMoments``."""

from snr_optim.sources.accumulation import AccumulationSource as AccumulationSource
from snr_optim.sources.data_parallel import DistributedDataParallelSource as DistributedDataParallelSource
from snr_optim.sources.data_parallel import FullyShardSource as FullyShardSource
from snr_optim.sources.data_parallel import source_of as source_of
from snr_optim.sources.norms import AdamNorm as AdamNorm
from snr_optim.sources.norms import Norm as Norm
from snr_optim.sources.norms import euclidean as euclidean
