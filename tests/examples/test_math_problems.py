"""Problems from files: bad lines by name and number; answers compared exactly, and no text too hostile to compare."""

from __future__ import annotations

import json
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.common.arithmetic import Problem
from examples.common.math_problems import final_answer, is_correct, load_problems, normalised, number, same_answer

GOOD = b'{"question": "6*7?", "answer": "six times seven\\n#### 42"}'
FRACTIONS = st.fractions(-(10**6), 10**6, max_denominator=1000)


def file_of(tmp_path, *lines):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def test_gsm8k_math_and_plain_answers_are_read(tmp_path):
    rows = [
        {"question": "a", "answer": "12 - 2 = <<12-2=10>>10\n#### 10"},
        {"problem": "b", "solution": r"Once $\boxed{1}$, then $\boxed{\frac{1}{\sqrt{2}}}$.", "level": 5},
        {"prompt": "c", "answer": "  x^2 + 1 "},
        {"problem": "d", "solution": r"see \boxed{7}", "answer": "7"},
        {"question": "e", "answer": r"it is \boxed 5$"},
        {"question": "f\u2028g", "answer": r"\boxed{\{1, 2\}}"},
    ]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    problems, bad = load_problems(file_of(tmp_path, b"\xef\xbb\xbf" + lines[0], *lines[1:], b"\r\n", b""))
    answers = ["10", r"\frac{1}{\sqrt{2}}", "x^2 + 1", "7", "5", r"\{1, 2\}"]
    assert problems == [Problem(q, a) for q, a in zip(["a", "b", "c", "d", "e", "f\u2028g"], answers, strict=True)]
    assert bad == []


BAD_LINES = {
    b"": "a blank line",
    b'{"question": "a", ': "no JSON",
    b"[" * 100_000: "no JSON",
    b'{"question": "a", "answer": ' + b"1" * 5000 + b"}": "no JSON",
    b'\xef\xbb\xbf{"question": "a", "answer": "1"}': "no JSON",
    b'["a", "1"]': "expected a JSON object, got list",
    b"\xff\xfe": "not UTF-8 (byte 0xff at position 0)",
    b'{"question": "caf\xe9", "answer": "1"}': "not UTF-8 (byte 0xe9 at position 17)",
    b'{"answer": "1"}': "no question or problem or prompt",
    b'{"question": "a"}': "no answer or solution",
    b'{"question": "a", "answer": null}': "no answer or solution",
    b'{"question": "a", "answer": 42}': "answer: expected a string, got int",
    b'{"prompt": [{"role": "user"}], "answer": "1"}': "prompt: expected a string, got list",
    b'{"question": " ", "answer": "1"}': "question: empty",
    b'{"question": "a", "answer": "so\\n####  "}': "answer: nothing after its last ####",
    b'{"question": "a", "solution": "so \\\\boxed{1"}': "solution: nothing after its last ####, or in its last \\boxed",
    b'{"question": "a", "solution": "it is 5"}': "solution: expected #### or \\boxed{}",
    b'{"question": "a", "answer": "it is\\n5"}': "answer: expected #### or \\boxed{}",
    b'{"question": "\\ud800", "answer": "5"}': "question: half of a surrogate pair",
    GOOD.replace(b"42", b"43"): "the question of line 1 again",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=list(BAD_LINES.values()))
def test_a_bad_line_is_named_by_file_and_number_or_left_out(line, tmp_path):
    path = file_of(tmp_path, GOOD, line, GOOD.replace(b"6", b"5"))
    with pytest.raises(ValueError, match="1 bad line") as error:
        load_problems(path)
    assert f"{path}:2: {BAD_LINES[line]}" in str(error.value)
    assert "\n" not in str(error.value)
    problems, bad = load_problems(path, skip_bad=True)
    assert [problem.prompt for problem in problems] == ["6*7?", "5*7?"]
    assert bad == [str(error.value).removeprefix("1 bad lines: ")]


def test_the_first_few_bad_lines_are_listed_and_the_rest_counted(tmp_path):
    path = file_of(tmp_path, *[b"{}"] * 8, GOOD)
    with pytest.raises(ValueError, match=r"^8 bad lines: .*:5: no question .*; and 3 more$"):
        load_problems(path)
    assert len(load_problems(path, skip_bad=True)[1]) == 8


def test_a_file_without_any_problem_is_an_error_even_if_bad_lines_are_left_out(tmp_path):
    for content, message in ((b"", "empty file"), (b"\xef\xbb\xbf\n \n", "empty file"), (b"{}\n{}", "2 bad lines")):
        with pytest.raises(ValueError, match=message):
            load_problems(file_of(tmp_path, content), skip_bad=True)
    with pytest.raises(ValueError, match="UTF-16"):
        load_problems(file_of(tmp_path, GOOD.decode().encode("utf-16")), skip_bad=True)
    with pytest.raises(OSError, match="nowhere"):
        load_problems(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (r"\boxed{1} but no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1}" "\n#### 2, of course\nor 3", " 2, of course"),
        (r"#### 2 or rather \boxed{3}", "3"),
        (r"$\fbox{x}$ 7", "x"),
        (r"$\boxed 7$ and 8", "7"),
        (r"it is \boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"cut off: 5, \boxed{1, \frac{1", None),
        (r"7 apples, then -1,234.50.", "-1,234.50"),
        (r"7 of them, or \frac{-3}{4}", r"\frac{-3}{4}"),
        ("odds of 3/4 ", "3/4"),
        ("17+3 is 20,", "20"),
        ("x = \N{MINUS SIGN}5", "-5"),
        ("pages 2-5", "5"),
        (r"\boxedtext{9}", "9"),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_box_or_mark_or_number(completion, expected):
    assert final_answer(completion) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,234,567", "1234567"), ("1{,}000", "1000"), (r"1,\!000", "1000"), (r"\$12.50", "12.5"), ("$7$.", "7"),
        ("3.", "3"), (".5", "0.50"), ("+4", "4"), ("-0", "0"), (r"50\%", "50"), (r"\frac{1}{2}", "0.5"),
        (r"\dfrac12", r"\tfrac{1}{2}"), ("-3/4", r"\frac{-3}{4}"), ("3/-4", r"-\frac34"), ("6/8", "0.75"),
        (r"1\frac{1}{2}", "1.5"), (r"-2\frac{1}{4}", "-9/4"), ("1e3", "1000"), ("2.5E-1", "1/4"),
        (r"\left( 1, \, x \right)", "(1,x)"), (r"\text{(A)}", "(A)"), (r"\text{yes}", "yes"), ("{5}", "5"),
        (r"\frac{x}{2}", "x/2"), (r"\frac{\frac{1}{2}}{3}", r"\frac{1/2}{3}"),
        ("\N{MINUS SIGN}5", "-5"), (r"\(7\)", "7"), ("1 1/2", "1.5"), ("(1, 2)", "(1,2)"),
    ],
)  # fmt: skip
def test_two_ways_to_write_one_answer_are_equal(one, other):
    assert same_answer(one, other)
    assert is_correct(rf"so \boxed{{{one}}}", other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("5", "5 cm"), ("5", r"5\text{ cm}"), ("1.5", r"11/2"), (r"1\frac{1}{2}", "11/2"), ("0.333", "1/3"), ("x", "X"),
        ("1,2", "12"), ("12,34", "1234"), ("(1,234)", "(1234)"), ("1/0", "2/0"), ("90", "90^\\circ"), ("", "0"),
        ("2(3)", "23"), ("2, 345", "2345"), ("12 , 345", "12345"), ("3 4", "34"), ("1 1/2", "11/2"),
            ("1" * 400 + ".0", "1" * 399 + "2.0"), ("1/2/3", "1/6"), ("0.1" + "0" * 300 + "1", "0.1"),
    ],
)  # fmt: skip
def test_different_answers_are_different(one, other):
    assert not same_answer(one, other)
    assert not same_answer(other, one)


def spellings(value: Fraction, rng: random.Random) -> str:
    sign, over, under = "-" if value < 0 else "", abs(value.numerator), value.denominator
    k = rng.randrange(1, 9)
    ways = [
        rf"{sign}\frac{{{k * over}}}{{{k * under}}}",
        rf"\dfrac{{{sign}{over}}}{{{under}}}",
        f"{sign}{over}/{under}",
    ]
    while under % 2 == 0:
        under //= 2
    while under % 5 == 0:
        under //= 5
    if under == 1:
        digits = f"{over * 10**12 // value.denominator:013d}"
        ways += [f"{sign}{digits[:-12]}.{digits[-12:]}", f"{sign}{int(digits[:-12]):,}.{digits[-12:]}"]
    return rng.choice(ways)


@given(FRACTIONS, st.randoms(use_true_random=False))
def test_every_spelling_of_a_number_has_its_value(value, rng):
    text = spellings(value, rng)
    dressed = rng.choice(["{}", "${}$", r"\left {}\right .", " {} .", r"{}\%", "{{{}}}", r"\text{{{}}}"]).format(text)
    assert number(normalised(dressed)) == value
    assert same_answer(dressed, spellings(value, rng))
    assert not same_answer(dressed, spellings(value + Fraction(1, 10**6), rng))


@given(st.text(alphabet="ab{}\\ ", max_size=30))
def test_whatever_is_in_the_box_comes_out_as_it_was(inside):
    depth, lowest, escaped = 0, 0, False
    for character in inside:  # character by character: a second way to see whether braces are balanced
        depth += 0 if escaped else {"{": 1, "}": -1}.get(character, 0)
        lowest, escaped = min(lowest, depth), character == "\\"
    if depth == lowest == 0 and not escaped:
        assert final_answer(rf"5 \boxed{{{inside}}} 6") == inside
    elif lowest == 0 and not escaped:
        assert final_answer(rf"5 \boxed{{{inside}}}") is None


HOSTILE = st.lists(
    st.sampled_from(["\\boxed", "{", "}", "####", "\\frac", "\\text", "1", "0" * 50, "e999999999", "/", ",", ".", "-"])
    | st.text(max_size=5),
    max_size=40,
).map("".join)


@given(HOSTILE, HOSTILE)
def test_no_text_raises_and_comparing_is_symmetric(one, other):
    assert same_answer(one, one)
    assert same_answer(one, other) is same_answer(other, one)
    assert is_correct(one, other) in (True, False)


@pytest.mark.parametrize(
    "text",
    [
        "1e999999999", "-1E-999999999", "1e" + "9" * 10**5, "9" * 10**5, "1/" + "7" * 10**5, "1" + ",000" * 10**5,
        "{" * 10**5, "\\boxed{" * 10**5, "\\frac{" * 10**5, "\\frac{1" * 10**5, "\\text{" * 10**5 + "}" * 10**5,
        "#" * 10**5, "\\frac{" * 160 + "}{1}" * 160, "(" * 10**5, "\\boxed" + " " * 10**5, "1." * 10**5, "-" * 10**5,
        "(1)/" * 250,
    ],
)  # fmt: skip
def test_hostile_text_neither_hangs_nor_raises(text):
    for completion in (text, rf"\boxed{{{text}}}", f"#### {text}"):
        assert not is_correct(completion, "42")
    assert same_answer(text, text)


def test_enormous_numbers_are_compared_as_text():
    assert is_correct("#### 1e999999999", "1e999999999")
    assert not is_correct("#### 1e999999999", "1e999999998")
    assert is_correct("#### " + "9" * 10**5, "9" * 10**5)
