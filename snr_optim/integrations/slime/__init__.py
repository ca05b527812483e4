"""The gradient-weighted baseline in slime, by the paths that its command line takes.

- ``advantages``: for ``--custom-reward-post-process-path``.
- ``data_source``: for ``--data-source-path``, so that slime's checkpoints keep what the baseline has learned.
- ``SlimeAdvantages``: what both are made of, for a baseline or weights of your own.
- ``check_unbiased``: which of slime's settings bias the gradient.

slime itself is imported when ``data_source`` is called.
"""

from snr_optim.integrations.slime.functions import SlimeAdvantages as SlimeAdvantages
from snr_optim.integrations.slime.functions import advantages as advantages
from snr_optim.integrations.slime.functions import data_source as data_source
from snr_optim.integrations.slime.settings import check_unbiased as check_unbiased
