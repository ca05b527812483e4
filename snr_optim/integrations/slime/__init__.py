"""The baseline in slime, by the paths that its command line takes: ``advantages`` and ``data_source``."""

from snr_optim.integrations.slime.functions import SlimeAdvantages as SlimeAdvantages
from snr_optim.integrations.slime.functions import advantages as advantages
from snr_optim.integrations.slime.functions import data_source as data_source
from snr_optim.integrations.slime.settings import check_unbiased as check_unbiased
