"""``python -m snr_optim.integrations.verl check [overrides of main_ppo]``: will it work, and is it unbiased?

Here: the command line, what it asks of the installation, and what it asks of a config.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from snr_optim.integrations.verl.estimators import ESTIMATORS, configured_baseline
from snr_optim.integrations.verl.settings import ACTOR, check_required, check_unbiased, has_our_optimizer
from snr_optim.integrations.verl.trainers import own_estimator

TESTED = "0.9.1"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m snr_optim.integrations.verl", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="look at the installation, and at a config if overrides are given")
    check.add_argument("overrides", nargs="*", help="as for verl.trainer.main_ppo: algorithm.adv_estimator=oblr_po ...")
    check.add_argument("--config-name", default="ppo_trainer")
    check.add_argument("--config-dir", type=Path, help="of your own configs, as for main_ppo")
    args = parser.parse_args(argv)
    problems = check_installation()
    if args.overrides or args.config_dir:
        problems += check_config(args.config_name, args.overrides, args.config_dir)
    print(f"{len(problems)} problem{'' if len(problems) == 1 else 's'}")
    return int(bool(problems))


def check_installation() -> list[str]:
    """Print what is found, and return what is wrong."""
    problems = []

    def say(good: bool, text: str) -> None:
        print(f"{'ok     ' if good else 'PROBLEM'}  {text}")
        if not good:
            problems.append(text)

    try:
        version = metadata.version("verl")
    except metadata.PackageNotFoundError:
        say(False, "verl is not installed")
        return problems
    say(True, f"verl {version} (tested with {TESTED})")
    entries = [entry for entry in metadata.entry_points(group="verl.plugins") if entry.value.startswith("snr_optim.")]
    say(
        bool(entries),
        "entry point verl.plugins: snr_optim" + ("" if entries else " is missing; install snr-optim again"),
    )
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    names = {name.strip() for name in policy.lower().split(",")}  # as verl reads it
    loaded = names == {"auto"} or any(entry.name in names for entry in entries)
    say(loaded, f"VERL_USE_EXTERNAL_PLUGINS={policy}" + ("" if loaded else " leaves snr_optim out"))

    from snr_optim.integrations.verl import plugin, replacing

    if not plugin.INSTALLED:
        say(False, "wrapt is not installed, and the plugin needs it: pip install wrapt")
        return problems
    for module in plugin.CHANGES:
        try:
            importlib.import_module(module)
            say(module not in replacing.problems, module)
        except Exception as error:
            say(False, f"{module} cannot be imported here: {error!r}")
    registry = getattr(sys.modules.get("verl.trainer.ppo.core_algos"), "ADV_ESTIMATOR_REGISTRY", {})
    for name, estimator in ESTIMATORS.items():
        known = registry.get(name) is estimator
        say(known, f"registered: {name}" if known else f"{name} is not registered in verl")
    for name, reason in replacing.problems.items():
        say(False, f"{name} {reason}")
    return problems


def check_config(name: str, overrides: list[str], folder: Path | None = None) -> list[str]:
    """Compose verl's config, let verl validate it, print what biases the gradient, and return what cannot work."""
    from hydra import compose, initialize_config_dir, initialize_config_module
    from hydra.errors import HydraException
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    verls, search = "verl.trainer.config", []
    if folder is None:  # hydra allows one of the two, and each is initialized when it is made
        context: Any = initialize_config_module(verls, version_base=None)
    else:
        context = initialize_config_dir(str(folder.resolve()), version_base=None)
        search = [f"hydra.searchpath=[pkg://{verls}]"]
    try:
        with context:
            config = compose(name, overrides=[*search, *overrides])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # verl's, that there is no critic
            validate_config(config, need_reference_policy(config), need_critic(config))
    except (HydraException, AssertionError, ValueError, TypeError) as error:
        problem = f"verl does not accept the config: {error}"
        print(f"PROBLEM  {problem}")
        return [problem]
    problems = check_required(config) + _unknown_names(config)
    for problem in problems:
        print(f"PROBLEM  {problem}")
    for finding in check_unbiased(config):
        print(f"biased   {finding}")
    return problems


def _unknown_names(config: Any) -> list[str]:
    """Return estimators, optimizers and options that nobody knows; verl would find them once the run has begun."""
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config.optimizer import build_optimizer

    problems = []
    name, known = own_estimator(config), importlib.import_module("verl.trainer.ppo.core_algos").ADV_ESTIMATOR_REGISTRY
    chosen = config.algorithm.adv_estimator
    if chosen not in known:
        problems.append(f"algorithm.adv_estimator={chosen} is unknown to verl: set one of {', '.join(known)}")
    try:
        if name is not None:
            configured_baseline(name, config.algorithm)
    except ValueError as error:
        problems.append(str(error))
    for role in (ACTOR, "critic"):
        if has_our_optimizer(config, role):
            settings = OmegaConf.select(config, f"{role}.optim")
            try:
                build_optimizer([torch.nn.Parameter(torch.zeros(1))], omega_conf_to_dataclass(settings))
            except Exception as error:
                problems.append(f"{role}.optim: {error}")
    return problems


if __name__ == "__main__":
    raise SystemExit(main())
