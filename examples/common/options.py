"""Command lines of the examples: one clear line for each option that cannot be."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, shows defaults, and knows the checks that examples have in common."""

    def __init__(self, **options: Any) -> None:
        running = getattr(sys.modules["__main__"], "__spec__", None)
        command = f"python -m {running.name}" if running is not None and running.name.startswith("examples.") else None
        super().__init__(prog=command, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        default = options.get("default")
        if default not in (None, argparse.SUPPRESS) and "help" in options and "default" not in options["help"]:
            options["help"] += " (default: %(default)s)"
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise SystemExit(f"error: {message}")

    def expect_at_least(self, args: argparse.Namespace, **least: int) -> None:
        """Each option by its name in ``args``, with the least that it may be."""
        for name, number in least.items():
            if getattr(args, name) < number:
                self.error(f"--{name.replace('_', '-')}: expected at least {number}, got {getattr(args, name)}")

    def expect_positive_lr(self, args: argparse.Namespace) -> None:
        """None is allowed, where the example has a default for each method."""
        if args.lr is not None and not 0 < args.lr < float("inf"):
            self.error(f"--lr: expected a positive number, got {args.lr}")

    def expect_model_folder(self, args: argparse.Namespace) -> None:
        """``--model``, if given, is what ``save_pretrained`` of transformers wrote."""
        if args.model and not (args.model / "config.json").is_file():
            self.error(f"--model: no Hugging Face model in {args.model} (config.json is not there)")

    def expect_folder(self, args: argparse.Namespace) -> None:
        """``--out`` is a folder, or nothing yet."""
        if args.out.exists() and not args.out.is_dir():
            self.error(f"--out: {args.out} is a file")
