"""The learning rate in any transformers Trainer.

- ``SNRCallback``: ``Trainer(..., callbacks=[SNRCallback()])``.

Importing this imports transformers.
"""

from snr_optim.integrations.transformers.callback import SNRCallback as SNRCallback
