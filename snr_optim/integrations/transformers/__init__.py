"""The learning rate in any transformers Trainer: ``callbacks=[SNRCallback()]``."""

from snr_optim.integrations.transformers.callback import SNRCallback as SNRCallback
