"""Baselines that leave the policy gradient unbiased and take as much of its variance as a baseline can."""

from snr_optim.baseline.module import GradWeightedBaseline as GradWeightedBaseline
