"""The baseline and the learning rate in verl, chosen by its config alone.

``plugin.py`` is what verl loads (entry point ``verl.plugins``); it puts ``trainers.py`` and ``engine.py`` to work
when verl imports what they change. ``estimators.py`` and ``optimizers.py`` hold what a config names, ``settings.py``
what a config should not say, and ``python -m snr_optim.integrations.verl check`` looks at it all.
"""

from snr_optim.integrations.verl.estimators import grad_weighted as grad_weighted
from snr_optim.integrations.verl.estimators import oblr_po as oblr_po
from snr_optim.integrations.verl.optimizers import SNRSGD as SNRSGD
from snr_optim.integrations.verl.optimizers import SNRAdamW as SNRAdamW
from snr_optim.integrations.verl.settings import check_unbiased as check_unbiased
