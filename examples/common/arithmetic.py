"""The task: addition and multiplication problems of mixed difficulty, their tokenizer and their verifier."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# (operator, digits of the left operand, digits of the right one), from easy to hard
LEVELS = (("+", 1, 1), ("+", 2, 1), ("+", 2, 2), ("*", 1, 1))


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str


def problems(num: int, seed: int, step: int) -> list[Problem]:
    """The problems of one step: the same for every method, and for a run that was resumed."""
    rng = random.Random(f"arithmetic {seed} {step}")
    return [_problem(rng) for _ in range(num)]


def _problem(rng: random.Random) -> Problem:
    operator, left_digits, right_digits = rng.choice(LEVELS)
    left, right = rng.randrange(10**left_digits), rng.randrange(10**right_digits)
    return Problem(f"{left}{operator}{right}=", str(left + right if operator == "+" else left * right))


def worked_examples(num: int, seed: int, step: int) -> list[str]:
    """Problems with answers to imitate, half of them wrong: a corpus that shows the task without mastering it."""
    rng = random.Random(f"worked examples {seed} {step}")
    texts = []
    for problem in problems(num, seed, step):
        slip = rng.choice((0, rng.randint(1, 9)))
        texts.append(f"{problem.prompt}{int(problem.answer) + slip}")
    return texts


def is_correct(completion: str, problem: Problem) -> bool:
    """The verifier: does the completion start with the right number?"""
    number = re.match(r"\s*(-?\d+)", completion)
    return number is not None and number[1] == problem.answer


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and the same interface as any other tokenizer."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+*="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
