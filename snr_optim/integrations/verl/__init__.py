"""The baseline and the learning rate in verl, chosen by its config alone.

- ``grad_weighted``, ``oblr_po``: for ``algorithm.adv_estimator`` (``estimators.py``).
- ``SNRSGD``, ``SNRAdamW``: for ``optim.optimizer`` (``optimizers.py``).
- ``check_unbiased``: which settings bias the gradient (``settings.py``).
- ``python -m snr_optim.integrations.verl check``: whether verl and a config will work with all this.

verl loads ``plugin.py`` by the entry point ``verl.plugins``. The plugin waits for the modules of verl that
``trainers.py`` and ``engine.py`` change, and ``replacing.py`` changes them. None of this imports verl.
"""

from snr_optim.integrations.verl.estimators import grad_weighted as grad_weighted
from snr_optim.integrations.verl.estimators import oblr_po as oblr_po
from snr_optim.integrations.verl.optimizers import SNRSGD as SNRSGD
from snr_optim.integrations.verl.optimizers import SNRAdamW as SNRAdamW
from snr_optim.integrations.verl.settings import check_unbiased as check_unbiased
