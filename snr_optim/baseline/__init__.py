"""Baselines that leave the policy gradient unbiased and take as much of its variance as a baseline can."""

from snr_optim.baseline.baseline import GradWeightedBaseline as GradWeightedBaseline
