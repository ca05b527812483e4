"""How well do cheap weights stand for ``||grad log pi(o)||^2``, before, early in and late in training, at which cost?

    python -m benchmarks.proxy_fidelity                   # a quarter of an hour on one core
    python -m benchmarks.proxy_fidelity --policies addition --plot addition.png

Two tasks of ``policy_stages`` with its Qwen3 of 75 thousand parameters (tied embeddings), and a Qwen3 of 2.2 million
(the proportions of Qwen3-0.6B, embeddings not tied) that adds up chains of digits, and may check itself, in up to 128
tokens. What the baseline weighs against each other are the outputs of one prompt: so the correlation within
prompts counts more than the one over all. A stand-in that does not tell the outputs of a prompt apart has 0 there.
"""

from __future__ import annotations

import argparse
import operator
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks import policy_stages
from benchmarks.harness import Row, environment, print_table, progress, pyplot, tidy, write_json
from examples.common.arithmetic import Problem, character_tokenizer
from examples.common.policy import Policy, Rollout, completion_logits, sample, tiny_qwen3
from snr_optim import PerSampleGradNorms, linear_grad_norms, logit_grad_norms, logprob_stats

Array = NDArray[np.float64]

ERRORS = (0.3, 0.1, 0.03)  # that sketches are asked for
SKETCHES = {f"sketch {error:.0%}": error for error in ERRORS}
PROXIES = {  # what each needs beside the forward pass of the training step, if it is to be known before the loss
    "none": "nothing",  # all alike: RLOO
    "length": "nothing",
    "sum w": "the logits",
    "sum w h^2": "the logits, hidden states",
    "head": "the logits, hidden states",
    "RMSNorm only": "a backward pass without weights",
    **dict.fromkeys(SKETCHES, "a backward pass without weights"),
    "exact": "a backward pass without weights",
}
CHUNK = 64  # outputs in a block
ADAPTING = 3  # blocks until a sketch has found its size
RESAMPLES = 200  # of the prompts
CHAIN, CHAIN_BATCH, CHAIN_LR = 16, 16, 1e-3  # terms, worked examples of a step
COLUMNS = ["policy", "stage", "pass_rate", "proxy", "spearman", "log_pearson", "spearman_within", "log_pearson_within",
           "excess", "relative_error", "columns"]  # fmt: skip


class Study(NamedTuple):
    """Policies of one architecture on one task."""

    policies: Callable[[tuple[int, ...]], Iterator[tuple[int, Policy]]]  # supervised steps, and what they led to
    stages: tuple[int, ...]
    problems: Callable[[int], list[Problem]]
    is_right: Callable[[str, str], bool]  # an output, given the answer
    prompts: int
    group: int
    max_new_tokens: int
    timed: int  # outputs in the batch whose cost is measured
    turns: int


# ----------------------------------------------------------------------------------------------- addition, mixed
def small_policies(task: str, stages: tuple[int, ...]) -> Iterator[tuple[int, Policy]]:
    """Those of ``policy_stages``, as its recorded steps find them: sharpened by RL, but for the one before training."""
    model, tokenizer = tiny_qwen3(0)
    optimizer = torch.optim.AdamW(model.parameters(), policy_stages.SUPERVISED_LR[task])
    for step in range(max(stages) + 1):
        if step in stages:
            yield step, (sharpened(model, tokenizer, task, step) if step else model, tokenizer)
        for group in optimizer.param_groups:
            group["lr"] = policy_stages.SUPERVISED_LR[task] * min(1.0, (1 + step) / 50)
        policy_stages.supervised_step(model, tokenizer, optimizer, task, step)


def sharpened(model: Any, tokenizer: Any, task: str, steps: int) -> Any:
    model = deepcopy(model)
    torch.manual_seed(policy_stages.STAGES[task].get(steps, steps))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.0)
    for step in range(policy_stages.SHARPENING):
        batch = policy_stages.problems(task, 64, f"sharpening {step}")
        policy_stages.reinforce(model, optimizer, *policy_stages.roll_out(model, tokenizer, batch, 8), group=8)
    return model


# -------------------------------------------------------------------------------------------------------- chains
def chain_policies(stages: tuple[int, ...]) -> Iterator[tuple[int, Policy]]:
    """After supervised steps alone."""
    model, tokenizer = small_qwen3(0)
    optimizer = torch.optim.AdamW(model.parameters(), CHAIN_LR)
    for step in range(max(stages) + 1):
        if step in stages:
            yield step, (model, tokenizer)
        for group in optimizer.param_groups:
            group["lr"] = CHAIN_LR * min(1.0, (1 + step) / 50)
        rng = random.Random(f"worked chains {step}")
        texts = [problem.prompt + worked_chain(rng, problem) + tokenizer.eos_token for problem in chains(rng)]
        encoded = tokenizer(texts, padding=True, return_tensors="pt")
        equals = encoded["input_ids"] == tokenizer.convert_tokens_to_ids("=")
        in_prompt = equals.cumsum(1) - equals.long() == 0  # no "=" before
        labels = encoded["input_ids"].masked_fill(in_prompt, -100)
        model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def small_qwen3(seed: int) -> Policy:
    """Qwen3-0.6B with 192 instead of 1024 hidden numbers, 4 of its 28 layers, and no tied embeddings."""
    tokenizer = character_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=576, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=48, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    return Qwen3ForCausalLM._from_config(config, attn_implementation="sdpa"), tokenizer


def chains(rng: random.Random, num: int = CHAIN_BATCH) -> list[Problem]:
    """Ones, twos and threes to add up; the answer is the last digit of each running sum."""
    of_each = [[rng.randrange(1, 4) for _ in range(CHAIN)] for _ in range(num)]
    return [
        Problem("+".join(map(str, terms)) + "=", "+".join(str(total % 10) for total in accumulate(terms)))
        for terms in of_each
    ]


def worked_chain(rng: random.Random, problem: Problem) -> str:
    """Once, or checked once or twice by doing it again: right answers differ in length."""
    return "=".join([problem.answer] * rng.randint(1, 3))


def is_right_chain(text: str, answer: str) -> bool:
    return set(text.split("=")) == {answer}


def small_study(task: str, *stages: int) -> Study:
    return Study(
        partial(small_policies, task), stages, lambda num: policy_stages.problems(task, num, "study"), operator.eq,
        prompts=64, group=8, max_new_tokens=policy_stages.MAX_NEW_TOKENS, timed=128, turns=15,
    )  # fmt: skip


STUDIES = {
    "addition": small_study("addition", 0, 90, 400),
    "mixed": small_study("mixed", 0, 160, 500, 2000),
    "chains": Study(
        chain_policies, (0, 50, 100, 300), lambda num: chains(random.Random("study"), num),
        is_right_chain, prompts=64, group=8, max_new_tokens=128, timed=16, turns=9,
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------ weights, exact and not
class Seen(NamedTuple):
    """A forward pass over outputs, and what may be had from it."""

    logits: Tensor  # [B, T, V]
    tokens: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    hidden: Tensor  # [B, T, d] what the head was given
    log_probs: Tensor  # [B]


def look(model: Any, rollout: Rollout) -> Seen:
    with head_inputs(model) as given:
        logits, tokens = completion_logits(model, rollout)
    mask = rollout["completion_mask"]
    log_probs = (logprob_stats(logits, tokens).log_prob * mask).sum(1)
    return Seen(logits, tokens, mask, given[0][:, -mask.shape[1] - 1 : -1].detach(), log_probs)


@contextmanager
def head_inputs(model: Any) -> Iterator[list[Tensor]]:
    given: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: given.append(args[0]))
    try:
        yield given
    finally:
        handle.remove()


def length(seen: Seen) -> Tensor:
    return seen.mask.sum(1).float()


def logit_norms(seen: Seen) -> Tensor:
    r"""``sum_t w_t``, ``w_t = ||e_y - p_t||^2``."""
    return logit_grad_norms(seen.logits, seen.tokens, seen.mask).sum(1)


def head_norms_by_token(seen: Seen) -> Tensor:
    r"""``sum_t w_t ||h_t||^2``: the head's norm, were the gradients of tokens orthogonal."""
    weights = logit_grad_norms(seen.logits, seen.tokens, seen.mask)
    return (weights * seen.hidden.square().sum(-1)).sum(1)


@torch.no_grad()
def head_norms(seen: Seen) -> Tensor:
    r"""``||sum_t (e_y - p_t) h_t^T||^2``: of the head alone, also where it is tied to the embedding."""
    own = seen.mask.bool()
    gradients = seen.logits[own].float().softmax(-1).neg_()
    gradients[torch.arange(len(gradients)), seen.tokens[own]] += 1
    ends = torch.nn.functional.pad(own.sum(1).cumsum(0), (1, 0))
    return linear_grad_norms(seen.hidden[own].float(), gradients, ends)


FROM_FORWARD = {"length": length, "sum w": logit_norms, "sum w h^2": head_norms_by_token, "head": head_norms}


def recorder(model: Any, name: str) -> PerSampleGradNorms:
    """The one of a proxy. No check: it compares with gradients of weights, and here are none."""
    if name == "RMSNorm only":
        return PerSampleGradNorms(model, parameters=is_of_norm, check="never")
    if name in SKETCHES:
        return PerSampleGradNorms(model, "sketch", relative_error=SKETCHES[name], check="never")
    return PerSampleGradNorms(model, check="never")


def is_of_norm(name: str) -> bool:
    return "norm" in name


def weigh(model: Any, rollout: Rollout) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Of each output the exact squared norm and every proxy, in float64; and the median size of each sketch."""
    recorders = {name: recorder(model, name) for name in ("RMSNorm only", *SKETCHES, "exact")}
    found: dict[str, list[Tensor]] = {name: [] for name in PROXIES if name != "none"}
    sizes: dict[str, list[int]] = {name: [] for name in SKETCHES}
    for number, rows in enumerate(torch.arange(len(rollout["input_ids"])).split(CHUNK)):
        seen = look(model, rows_of(rollout, rows))
        for name, proxy in FROM_FORWARD.items():
            found[name].append(proxy(seen).detach().double())
        for name, norms in recorders.items():
            for _ in range(ADAPTING if number == 0 and name in SKETCHES else 1):
                size = norms.sketch_size
                with norms.sequences(batch_size=len(rows)):
                    norms.backward(seen.log_probs.sum(), retain_graph=True)
            found[name].append(norms.squared().double())
            if name in SKETCHES:
                sizes[name].append(size)
    for norms in recorders.values():
        norms.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}, {n: int(np.median(s)) for n, s in sizes.items()}


def rows_of(rollout: Rollout, rows: Tensor) -> Rollout:
    """Some outputs, without the columns that none of them has."""
    mask = rollout["completion_mask"][rows]
    new, prompt = int(mask.sum(1).max()), rollout["input_ids"].shape[1] - mask.shape[1]
    attention = rollout["attention_mask"][rows]
    kept = slice(int(attention.argmax(1).min()), prompt + new)
    return {
        "input_ids": rollout["input_ids"][rows, kept],
        "attention_mask": attention[:, kept],
        "completion_mask": mask[:, :new],
    }


def distinct(rollout: Rollout, group: int) -> tuple[Tensor, Tensor]:
    """A row of each output that differs from the others of its prompt, and which of those every row is.

    Equal outputs then have equal weights, which in a batch they have up to rounding.
    """
    mask = rollout["completion_mask"]
    tokens = rollout["input_ids"][:, -mask.shape[1] :].masked_fill(~mask, -1)
    prompt = torch.arange(len(mask)).div(group, rounding_mode="floor")[:, None]
    found, which = torch.unique(torch.cat([prompt, tokens], dim=1), dim=0, return_inverse=True)
    first = torch.full((len(found),), len(mask)).scatter_reduce(0, which, torch.arange(len(mask)), "amin")
    return first, which


# --------------------------------------------------------------------------------------------------------- agreement
def ranks(x: Array) -> Array:
    """From 1; equal values share the mean of theirs."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts - 1) / 2)[which])


def pearson(x: Array, y: Array) -> float:
    """0 where ``x`` does not vary."""
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size > 0 else 0.0


def spearman(x: Array, y: Array) -> float:
    return pearson(ranks(x), ranks(y))


def log_pearson(x: Array, y: Array) -> float:
    return pearson(logs(x), logs(y))


def logs(x: Array) -> Array:
    return np.log(np.maximum(x, 1e-30))


def agreement(proxy: Array, exact: Array, rewards: Array) -> Row:
    """Correlations of ``[P, G]`` weights with 90 % intervals, by resampling prompts; and what the weights are worth.

    Within prompts: the mean over those whose outputs are not all alike. ``excess`` is how much more ``E[w (r - b)^2]``,
    the variance up to a constant, is left by the baselines of these weights than by those of exact ones, each prompt's
    own, from all of its outputs; None where no output or every one is right. It is the most that can be at stake: a
    baseline that leaves the output out, or is shrunk towards other prompts, depends less on the weights.
    """
    rng = np.random.default_rng(0)
    varied = np.flatnonzero(exact.min(1) < exact.max(1))
    row: Row = {"varied_prompts": len(varied)}
    for name, correlation in (("spearman", spearman), ("log_pearson", log_pearson)):
        row[name] = correlation(proxy.ravel(), exact.ravel())
        drawn = [rng.integers(len(proxy), size=len(proxy)) for _ in range(RESAMPLES)]
        row[f"{name}_interval"] = interval([correlation(proxy[d].ravel(), exact[d].ravel()) for d in drawn])
        within = np.array([correlation(proxy[q], exact[q]) for q in varied])
        row[f"{name}_within"] = float(within.mean()) if len(within) else None
        means = [within[rng.integers(len(within), size=len(within))].mean() for _ in range(RESAMPLES) if len(within)]
        row[f"{name}_within_interval"] = interval(means) if means else None
    least = left_over(exact, exact, rewards)
    row["excess"] = left_over(proxy, exact, rewards) / least - 1 if least > 0 else None
    return row


def left_over(weights: Array, exact: Array, rewards: Array) -> float:
    weights = np.maximum(weights, 1e-30)
    baselines = (weights * rewards).sum(1, keepdims=True) / weights.sum(1, keepdims=True)
    return float((exact * (rewards - baselines) ** 2).sum())


def interval(values: list[float]) -> list[float]:
    return [float(bound) for bound in np.quantile(values, (0.05, 0.95))]


def measure(name: str, study: Study, stage: int, policy: Policy) -> tuple[list[Row], Rollout]:
    """A row per proxy, and the outputs."""
    model, tokenizer = policy
    batch = study.problems(study.prompts)
    torch.manual_seed(1000 + stage)
    rollout, texts = sample(model, tokenizer, batch, study.group, study.max_new_tokens)
    shape = (study.prompts, study.group)
    right = [study.is_right(text, batch[i // study.group].answer) for i, text in enumerate(texts)]
    rewards = np.array(right, dtype=float).reshape(shape)
    first, which = distinct(rollout, study.group)
    weights, sizes = weigh(model, rows_of(rollout, first))
    by_output = {proxy: w[which].numpy().reshape(shape) for proxy, w in weights.items()}
    exact = by_output.pop("exact")
    head: Row = {
        "policy": name, "stage": stage, "pass_rate": float(rewards.mean()), "outputs": exact.size,
        "distinct": len(first), "mean_length": float(by_output["length"].mean()),
    }  # fmt: skip
    rows = [head | {"proxy": "none"} | agreement(np.ones(shape), exact, rewards)]
    for proxy, found in by_output.items():
        row = head | {"proxy": proxy} | agreement(found, exact, rewards)
        if proxy in sizes:
            row["columns"] = sizes[proxy]
            row["relative_error"] = float(np.sqrt(np.mean((weights[proxy] / weights["exact"] - 1).numpy() ** 2)))
        rows.append(row)
    return rows, rollout


# -------------------------------------------------------------------------------------------------------------- costs
def costs(name: str, study: Study, model: Any, rollout: Rollout, sizes: dict[str, int]) -> list[Row]:
    """What each proxy adds to forward and backward of a training step on some of the outputs.

    ``extra``: for weights that are known before the loss, from the same forward pass. ``riding``: for those that come
    with the backward pass of the loss, so for later batches. All take turns, and a turn is compared with the training
    step of that turn.
    """
    part = rows_of(rollout, torch.linspace(0, len(rollout["input_ids"]) - 1, study.timed).long())
    advantages = torch.randn(study.timed, generator=torch.Generator().manual_seed(0))
    calls: dict[tuple[str, str], Callable[[], Seconds]] = {}
    for proxy in PROXIES:
        own = deepcopy(model)  # with no hooks but its own
        if proxy == "none" or proxy in FROM_FORWARD:
            calls[proxy, "extra"] = partial(training_step, own, part, advantages, proxy)
            continue
        norms = recorder(own, proxy)
        norms.sketch_size = sizes.get(proxy, norms.sketch_size)
        for how in ("extra", "riding"):
            calls[proxy, how] = partial(training_step, own, part, advantages, proxy, norms, how)
    times: dict[tuple[str, str], list[Seconds]] = {call: [] for call in calls}
    for turn in range(study.turns + 1):
        for call, step in calls.items():
            seconds = step()
            if turn:  # the first one warms up
                times[call].append(seconds)
    plain = np.array([seconds.step for seconds in times["none", "extra"]])
    rows = []
    for proxy, needs in PROXIES.items():
        row: Row = {"policy": name, "proxy": proxy, "needs": needs, "step_ms": 1e3 * float(np.median(plain))}
        relative = {"extra": np.array([seconds.weights for seconds in times[proxy, "extra"]]) / plain}
        if (proxy, "riding") in times:
            relative["riding"] = np.array([seconds.step for seconds in times[proxy, "riding"]]) / plain - 1
        for how, shares in relative.items():
            row[how] = float(np.median(shares))
            row[f"{how}_interval"] = [float(bound) for bound in np.quantile(shares, (0.2, 0.8))]
        rows.append(row)
    return rows


class Seconds(NamedTuple):
    """Of a training step, and of what it did for weights before the backward pass."""

    step: float
    weights: float


def training_step(
    model: Any, rollout: Rollout, advantages: Tensor, proxy: str, norms: PerSampleGradNorms | None = None,
    how: str = "extra",
) -> Seconds:  # fmt: skip
    """Forward, weights, backward."""
    model.zero_grad()
    start = time.perf_counter()
    seen = look(model, rollout)
    loss = -(advantages * seen.log_probs).mean()
    begun = time.perf_counter()
    if proxy in FROM_FORWARD:
        FROM_FORWARD[proxy](seen)
    elif norms is not None and how == "extra":
        with norms.sequences(batch_size=len(advantages)):
            norms.backward(seen.log_probs.sum(), retain_graph=True)
        norms.squared()
    done = time.perf_counter()
    if norms is not None and how == "riding":
        with norms.sequences(batch_size=len(advantages)):
            loss.backward()
        norms.squared(scale=advantages / len(advantages))
    else:
        loss.backward()
    return Seconds(time.perf_counter() - start, done - begun)


# ------------------------------------------------------------------------------------------------------------ report
def draw(rows: list[Row], spent: list[Row], path: Path) -> None:
    """Against the stage: rank correlation over all outputs and within prompts, and what the weights are worth."""
    plt = pyplot()
    shown = {
        "length": ("#8d99ae", "o"), "sum w h^2": ("#c28e0e", "s"), "sum w": ("#8a5cd6", "^"), "head": ("#c8553d", "v"),
        "RMSNorm only": ("#4a9c6d", "P"), "sketch 30%": ("#8ec1e8", "D"), "sketch 10%": ("#0b6fb8", "D"),
    }  # fmt: skip
    panels = {
        "spearman": "rank correlation,\nall outputs", "spearman_within": "rank correlation,\noutputs of one prompt",
        "excess": "variance, b of the prompt alone,\nabove that of exact weights",
    }  # fmt: skip
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    figure, grid = plt.subplots(
        3, len(policies), figsize=(4.2 * len(policies), 8.4), layout="constrained", sharey="row", squeeze=False
    )
    for column, policy in enumerate(policies):
        of_policy = [row for row in rows if row["policy"] == policy]
        stages = {row["stage"]: row["pass_rate"] for row in of_policy}
        for axes, what in zip(grid[:, column], panels, strict=True):
            for proxy, (colour, marker) in shown.items():
                found = [row for row in of_policy if row["proxy"] == proxy and row[what] is not None]
                x = [list(stages).index(row["stage"]) for row in found]
                wide = proxy == "sum w h^2"  # with the hidden states of an RMSNorm much the same as the next one
                axes.plot(x, [row[what] for row in found], color=colour, marker=marker, ms=8 if wide else 5,
                          lw=3.2 if wide else 1.5, label=label(proxy, policies[-1], spent))  # fmt: skip
                if what != "excess":
                    bounds = np.array([row[f"{what}_interval"] for row in found]).reshape(-1, 2)
                    axes.fill_between(x, *bounds.T, color=colour, alpha=0.1, lw=0)
            axes.set_xticks(range(len(stages)), [f"{steps}\n{rate:.2f}" for steps, rate in stages.items()])
            axes.set_xlim(-0.2, len(stages) - 0.8)
            tidy(axes)
        grid[0, column].set_title(f"{policy}: {of_policy[0]['outputs']} outputs a stage")
        grid[-1, column].set_xlabel("supervised steps, pass rate")
    for axes, (what, title) in zip(grid[:, 0], panels.items(), strict=True):
        axes.set_ylabel(title)
        if what == "excess":
            axes.set_yscale("symlog", linthresh=1e-2)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            axes.set_ylim(bottom=0)
        else:
            lowest = min((row[what] for row in rows if row[what] is not None), default=0)
            axes.set_ylim(min(0, lowest) - 0.05, 1.03)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def label(proxy: str, policy: str, spent: list[Row]) -> str:
    found = [row["extra"] for row in spent if (row["policy"], row["proxy"]) == (policy, proxy)]
    name = {"sum w": "$\\sum w_t$", "sum w h^2": "$\\sum w_t\\, ||h_t||^2$", "head": "head, exact"}.get(proxy, proxy)
    return f"{name} (+{found[0]:.1%} of a step)" if found else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=list(STUDIES), choices=STUDIES)
    parser.add_argument("--out", type=Path, default=Path("runs/proxy_fidelity"))
    parser.add_argument("--plot", type=Path, help="where to draw the picture, if not beside the numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    origin = environment(torch.device("cpu"))
    rows: list[Row] = []
    spent: list[Row] = []
    with progress(sum(len(STUDIES[name].stages) for name in args.policies)) as report:
        for name in args.policies:
            study = STUDIES[name]
            for stage, policy in study.policies(study.stages):
                of_stage, rollout = measure(name, study, stage, policy)
                rows += of_stage
                if stage == max(study.stages):
                    sizes = {row["proxy"]: row["columns"] for row in of_stage if "columns" in row}
                    spent += costs(name, study, policy[0], rollout, sizes)
                report(f"{name} {stage}: pass rate {of_stage[0]['pass_rate']:.2f}")
    write_json(args.out / "proxy_fidelity.json", "proxy_fidelity", origin, rows=rows, costs=spent)
    print_table(rows, COLUMNS)
    print_table(spent, ["policy", "proxy", "needs", "step_ms", "extra", "riding"])
    draw(rows, spent, args.plot or args.out / "proxy_fidelity.png")


if __name__ == "__main__":
    main()
