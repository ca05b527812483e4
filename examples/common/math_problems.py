r"""Problems with checkable answers from a JSONL file, and the checker: GSM8K, MATH, and what looks like them.

A line is an object with ``question``, ``problem`` or ``prompt``, and ``answer`` or ``solution``: GSM8K's ``#### 42``,
MATH's ``\boxed{...}``, or an ``answer`` that is nothing but the answer. Here: reading, and comparing; how a question
is put to a model is the business of the script that trains it.
"""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

from examples.common.arithmetic import Problem

QUESTIONS, ANSWERS = ("question", "problem", "prompt"), ("answer", "solution")
# What the checker reads is where a model is told to write.
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
LISTED = 5  # bad lines that an error names
LONGEST = 1000  # characters of an answer that are looked into; longer ones are compared as they are
LARGEST_EXPONENT = 400

# -------------------------------------------------------------------------------------------------- reading a file


def load_problems(path: str | Path, *, skip_bad: bool = False) -> tuple[list[Problem], list[str]]:
    """All problems of a JSONL file in UTF-8, and what is wrong with the lines that were left out.

    Bad are lines that are blank, no JSON object or not UTF-8, that lack a question or an answer or have one that is no
    text, and those whose question was there before. A byte-order mark of UTF-8 at the very beginning is passed over.

    Args:
        path: of the file.
        skip_bad: leave bad lines out, and report them, instead of raising.

    Raises:
        ValueError: bad lines, the first few by file and line; an empty file, or one of nothing but bad lines.
        OSError: the file cannot be read.
    """
    content = Path(path).read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path}:1: UTF-16; expected UTF-8")
    content = content.removeprefix(b"\xef\xbb\xbf").rstrip()
    if not content:
        raise ValueError(f"{path}:1: an empty file; expected a JSON object a line")
    problems: list[Problem] = []
    bad: list[str] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):  # U+2028 is no end of a line in JSON
        try:
            problem = _problem(line)
            if problem.prompt in seen:
                raise ValueError(f"the question of line {seen[problem.prompt]} again")
        except ValueError as error:
            bad.append(f"{path}:{number}: {error}")
            continue
        seen[problem.prompt] = number
        problems.append(problem)
    if bad and not (skip_bad and problems):
        more = f"; and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        raise ValueError(f"{len(bad)} bad lines: {'; '.join(bad[:LISTED])}{more}")
    return problems, bad


def _problem(line: bytes) -> Problem:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start})") from None
    if not text.strip():
        raise ValueError("a blank line")
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError):  # a number of thousands of digits; thousands of brackets
        raise ValueError("no JSON that Python reads") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    (_, question), (field, answer) = _text(row, QUESTIONS), _text(row, ANSWERS)
    try:
        return Problem(question, _final(answer, plain=field == "answer"))
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def _text(row: dict[str, Any], names: tuple[str, ...]) -> tuple[str, str]:
    """The first of these fields that is there."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise ValueError(f"no {' or '.join(names)}")
    if not isinstance(row[name], str):
        raise ValueError(f"{name}: expected a string, got {type(row[name]).__name__}")
    text = row[name].strip()
    if not text:
        raise ValueError(f"{name}: empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name}: half of a surrogate pair, which no tokenizer takes")
    return name, text


def _final(text: str, plain: bool) -> str:
    """The answer that a worked solution ends with, or a plain one as it is."""
    mark = _last_mark(text)
    if mark:
        found = _behind(mark)
        if found is None or not found.strip():
            raise ValueError("nothing after its last ####, or in its last \\boxed{}")
        return found.strip()
    if not plain or "\n" in text:
        raise ValueError("expected #### or \\boxed{} before the answer")
    return text


# -------------------------------------------------------------------------------------------- comparing answers

_MARK = re.compile(r"####|\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_LAST = re.compile(
    r"(?:(?<![\w.)])-)?(?:\\[dt]?frac\{-?\d+\}\{-?\d+\}|(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?(?:/\d+)?)",
    re.ASCII,
)


def is_correct(completion: str, answer: str) -> bool:
    """Does the completion end with this answer? Never raises, and takes time in proportion to the length."""
    found = final_answer(completion)
    return found is not None and same_answer(found, answer)


def final_answer(completion: str) -> str | None:
    r"""What stands in the last ``\boxed{}`` or behind the last ``####``; without either the last number, or None.

    A last ``\boxed{`` that is never closed, as in outputs that were cut off, is no answer.

    Example:
        >>> final_answer(r"So it is 3, \boxed{\frac{1}{2}}."), final_answer("7 is a lot, so 1,234."), final_answer("?")
        ('\\frac{1}{2}', '1,234', None)
    """
    mark = _last_mark(completion)
    if mark:
        return _behind(mark)
    numbers = _LAST.findall(completion.replace("\N{MINUS SIGN}", "-"))
    return numbers[-1].rstrip(",") if numbers else None


def _last_mark(text: str) -> re.Match[str] | None:
    last = None
    for mark in _MARK.finditer(text):
        last = mark
    return last


def _behind(mark: re.Match[str]) -> str | None:
    """The answer that is marked; None if its braces are not closed."""
    text, start = mark.string, mark.end()
    if mark[0] == "####":
        return text[start:].split("\n", 1)[0]
    if text[start : start + 1] == "{":
        return _in_braces(text, start)
    return re.split(r"[\s$]", text[start:], maxsplit=1)[0]  # \boxed 5


def _in_braces(text: str, start: int) -> str | None:
    depth = 0
    for brace in re.compile(r"\\?[{}]").finditer(text, start):
        if len(brace[0]) == 1:  # \{ is text
            depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start + 1 : brace.start()]
    return None


def same_answer(one: str, other: str) -> bool:
    r"""Equal as numbers, exactly, where both are numbers; as normalised text otherwise.

    Example:
        >>> same_answer(r"\$1,200.50", "2401/2"), same_answer(r"\left( 1, x\right)", "(1,x)"), same_answer("5 cm", "5")
        (True, True, False)
    """
    texts = normalised(one), normalised(other)
    numbers = [None if _LIST.search(raw) else number(text) for raw, text in zip((one, other), texts, strict=True)]
    return texts[0] == texts[1] if None in numbers else numbers[0] == numbers[1]


_MIXED = re.compile(r"(?<![\w.,/)}])(\d+)(?:\s|\\[,;:! ]|~)+(\d+)/(\d+)(?![\w.,/])", re.ASCII)  # 1 1/2
_LIST = re.compile(r"\d(?:\s+,\s*|,\s+)\d", re.ASCII)  # 2, 345 is not 2345
_SPACES = re.compile(r"\\[,;:! ]|\\q?quad(?![a-zA-Z])|~|(?<!\d)\s+|\s+(?!\d)")  # 3 4 is not 34
_STRIPPED = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[()\[\]$%]|[$%]")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\[dt]?frac(\d)(\d)", re.ASCII)
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\{([^{}]*)\}")
_SIMPLE = re.compile(r"(?<![\w)}])\((\w+)\)/\((\w+)\)")


def normalised(text: str) -> str:
    r"""An answer without what LaTeX and habit put around it; units, words and the order of terms are left alone.

    Gone are spaces, ``$`` and ``%`` (so 50 % is 50), ``\left`` and ``\right``, the ``\text`` around a text and a dot at
    the end; ``\frac{a}{b}`` is ``a/b``. A text of more than 1000 characters is only stripped.

    Example:
        >>> normalised(r"$\dfrac{x+1}{2}$."), normalised(r"5\text{ cm}"), normalised(r"1{,}000, 2")
        ('(x+1)/(2)', '5cm', '1,000,2')
    """
    text = text.strip()
    if len(text) > LONGEST:
        return text
    text = text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",")
    text = _SPACES.sub("", _MIXED.sub(r"\1\\frac{\2}{\3}", text))
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", _STRIPPED.sub("", text))
    before = ""
    while text != before:  # from the inside out
        before = text
        text = _FRACTION.sub(r"(\1)/(\2)", _TEXT.sub(r"\1", text))
    text = _SIMPLE.sub(r"\1/\2", text).removesuffix(".")
    while text.startswith("{") and _in_braces(text, 0) == text[1:-1]:
        text = text[1:-1]
    return text


_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(rf"([+-]?)({_DECIMAL})(?:[eE]([+-]?\d+))?", re.ASCII)
_RATIO = re.compile(r"([+-]?)(?:(\d+)(?=\())?\(?([^()/]+)\)?/\(?([^()/]+)\)?", re.ASCII)  # 1(1)/(2) is one and a half


def number(text: str) -> Fraction | None:
    r"""The exact value of a normalised number, fraction or mixed number; None for all else, and for what is enormous.

    Example:
        >>> number("-1,200.5"), number("3/-4"), number(normalised(r"1\frac{1}{2}")), number("1e999999999"), number("x")
        (Fraction(-2401, 2), Fraction(-3, 4), Fraction(3, 2), None, None)
    """
    if len(text) > LONGEST:
        return None
    plain = _decimal(text)
    if plain is not None:
        return plain
    ratio = _RATIO.fullmatch(text)
    if ratio is None:
        return None
    over, under = _decimal(ratio[3]), _decimal(ratio[4])
    if over is None or not under:
        return None
    value = over / under + Fraction(ratio[2] or 0)
    return -value if ratio[1] == "-" else value


def _decimal(text: str) -> Fraction | None:
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    sign, digits, exponent = found.groups()
    if exponent is not None and (len(exponent) > 9 or abs(int(exponent)) > LARGEST_EXPONENT):
        return None
    value = Fraction(digits.replace(",", "").rstrip(".")) * Fraction(10) ** int(exponent or 0)
    return -value if sign == "-" else value
