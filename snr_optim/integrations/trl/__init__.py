"""The baseline in TRL's GRPOTrainer and RLOOTrainer, and what in their settings biases the gradient."""

from snr_optim.integrations.trl.settings import check_unbiased as check_unbiased
from snr_optim.integrations.trl.trainer import TESTED as TESTED
from snr_optim.integrations.trl.trainer import OBLRTrainerMixin as OBLRTrainerMixin
