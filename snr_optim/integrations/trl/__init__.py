"""The gradient-weighted baseline in TRL's GRPOTrainer and RLOOTrainer.

- ``OBLRTrainerMixin``: put it before the trainer, ``class MyTrainer(OBLRTrainerMixin, GRPOTrainer)``.
- ``check_unbiased``: which of a config's settings bias the gradient.
- ``TESTED``: the versions of TRL that the tests run with.

TRL itself is not imported. The learning rate is ``snr_optim.integrations.transformers.SNRCallback``.
"""

from snr_optim.integrations.trl.settings import check_unbiased as check_unbiased
from snr_optim.integrations.trl.trainer import TESTED as TESTED
from snr_optim.integrations.trl.trainer import OBLRTrainerMixin as OBLRTrainerMixin
