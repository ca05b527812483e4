"""Small Qwen3s at several stages of training: exact gradients of what they sample, and the batches that led there.

    python -m benchmarks.policy_stages                   # both tasks, all stages: half an hour on two cores
    python -m benchmarks.policy_stages --tasks addition --stages 90

A stage is a policy after supervised steps on worked examples, then reinforcement learning that sharpens it, then RL
steps that are recorded: what a baseline could have learned by then. Two of those visited the prompts of the study. The
outputs sampled at the end, with replacement from now on, *are* the policy of the study: every expectation under it,
the oracle's baseline included, is a finite sum.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import progress
from examples.common.arithmetic import Problem
from examples.common.policy import Rollout, completion_logits, sample, sequence_log_probs, tiny_qwen3
from snr_optim import GradWeightedBaseline, logit_grad_norms, per_sample_grad_norms_func

# Kinds of problems: an operator with the digits of both operands, or a chain of so many one-digit numbers whose answer
# is its running sums, so that outputs differ in length.
KINDS: dict[str, tuple[Any, ...]] = {
    "addition": (("+", 2, 1),),
    "mixed": (("+", 1, 1), ("+", 2, 1), ("+", 2, 2), ("*", 1, 1), ("chain", 3), ("chain", 4)),
}
STAGES = {  # supervised steps before RL, and the seed of what follows
    "addition": {60: 4, 90: 0, 150: 1, 230: 2, 400: 5, 1500: 3},
    "mixed": {160: 0, 500: 1, 1000: 2, 2000: 4, 4000: 3},
}
CONVERGED = (1500, 4000)  # pass rates of 0.99 and more: part of the study only where they are asked for
SUPERVISED_LR = {"addition": 1e-3, "mixed": 1.5e-3}
SHARPENING, RECORDED = 60, 20  # RL steps
PROMPTS, GROUP = 128, 16  # of a recorded batch; the study takes parts of it
VISITS = (0, 10)  # recorded steps whose prompts are those of the study
OUTPUTS = 128  # per prompt, that make up the policy of the study
FEW_OUTPUTS, EARLY = 48, 80  # of policies after fewer supervised steps than that, whose outputs hardly repeat
MAX_NEW_TOKENS = 13


class Recorded(NamedTuple):
    """One earlier batch."""

    rewards: Tensor  # [prompts, group]
    weights: Tensor  # exact squared norms
    prompts: Tensor  # [prompts] ids


class Outputs(NamedTuple):
    """The distinct outputs of one prompt."""

    probability: Tensor  # [U], sums to 1
    rewards: Tensor
    nodes: Tensor  # [U, T] rows of the tokens in ``Stage.gram``; -1 after the end
    token_weights: Tensor  # [U, T] ||e_y - p||^2
    head_weights: Tensor  # [U] sum_t ||e_y - p||^2 ||h_t||^2


@dataclass
class Stage:
    """A policy, and what is known of it."""

    task: str
    supervised_steps: int
    outputs: list[Outputs]  # of each prompt
    prompts: Tensor  # [P] ids
    history: list[Recorded]
    gram: Tensor  # [nodes, nodes] inner products of the gradients of single log-probs

    @property
    def pass_rate(self) -> float:
        return float(torch.stack([(o.probability * o.rewards).sum() for o in self.outputs]).mean())


# ------------------------------------------------------------------------------------------------------------ the task
def problems(task: str, num: int, seed: str) -> tuple[list[Problem], Tensor]:
    """Problems, and the kind of each."""
    rng = random.Random(f"stages {task} {seed}")
    kinds = [rng.randrange(len(KINDS[task])) for _ in range(num)]
    return [_problem(rng, KINDS[task][kind]) for kind in kinds]


def _problem(rng: random.Random, kind: tuple[Any, ...]) -> Problem:
    if kind[0] == "chain":
        terms = [rng.randrange(10) for _ in range(kind[1])]
        sums = [sum(terms[:n]) for n in range(2, len(terms) + 1)]
        return Problem("+".join(map(str, terms)) + "=", "+".join(map(str, sums)))
    operator, left_digits, right_digits = kind
    left, right = rng.randrange(10**left_digits), rng.randrange(10**right_digits)
    return Problem(f"{left}{operator}{right}=", str(left + right if operator == "+" else left * right))


def worked_example(rng: random.Random, problem: Problem) -> str:
    """One in ten with slips."""
    if rng.random() > 0.1:
        return problem.prompt + problem.answer
    return problem.prompt + "+".join(
        str(int(n) + rng.choice((0, 0, rng.randint(1, 9)))) for n in problem.answer.split("+")
    )


def supervised_step(model: Any, tokenizer: Any, optimizer: Any, task: str, step: int) -> None:
    rng = random.Random(f"worked examples {task} {step}")
    batch = problems(task, 128, f"supervised {step}")
    texts = [worked_example(rng, problem) + tokenizer.eos_token for problem in batch]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    answer = (encoded["input_ids"] == tokenizer.convert_tokens_to_ids("=")).cumsum(1).cummax(1).values > 0
    starts = encoded["input_ids"] == tokenizer.convert_tokens_to_ids("=")
    labels = encoded["input_ids"].masked_fill(~answer | starts | (encoded["attention_mask"] == 0), -100)
    model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------------------- the policy
def roll_out(model: Any, tokenizer: Any, batch: list[Problem], group: int) -> tuple[Rollout, Tensor]:
    rollout, texts = sample(model, tokenizer, batch, group, MAX_NEW_TOKENS)
    return rollout, torch.tensor([float(text == batch[i // group].answer) for i, text in enumerate(texts)])


def exact_norms(model: Any, rollout: Rollout) -> Tensor:
    return per_sample_grad_norms_func(model, lambda m, one: sequence_log_probs(m, one).sum(), rollout, chunk_size=64)


def reinforce(model: Any, optimizer: Any, rollout: Rollout, rewards: Tensor, group: int) -> None:
    """One step with the pooled baseline."""
    with torch.no_grad():
        logits, tokens = completion_logits(model, rollout)
    weights = logit_grad_norms(logits, tokens, rollout["completion_mask"]).sum(1)
    advantages = GradWeightedBaseline("batch").advantages(rewards, weights, groups=group)
    (-(advantages * sequence_log_probs(model, rollout)).sum() / len(rewards)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def build(job: tuple[str, int, Path]) -> Path:
    """Train up to one stage, record, sample and differentiate; written to the folder."""
    task, steps, folder = job
    path = folder / f"{task}-{steps}.pt"
    if path.exists():
        return path
    model, tokenizer = tiny_qwen3(0)
    optimizer = torch.optim.AdamW(model.parameters(), SUPERVISED_LR[task])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = SUPERVISED_LR[task] * min(1.0, (1 + step) / 50)
        supervised_step(model, tokenizer, optimizer, task, step)

    torch.manual_seed(STAGES[task][steps])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.0)
    for step in range(SHARPENING):
        batch = problems(task, 64, f"sharpening {step}")
        reinforce(model, optimizer, *roll_out(model, tokenizer, batch, 8), group=8)

    ids: dict[str, int] = {}
    study = problems(task, PROMPTS, "study")
    history = []
    optimizer = torch.optim.AdamW(model.parameters(), 2e-4, weight_decay=0.0)
    for step in range(RECORDED):
        batch = study if step in VISITS else problems(task, PROMPTS, f"recorded {step}")
        rollout, rewards = roll_out(model, tokenizer, batch, GROUP)
        history.append(
            Recorded(
                rewards.view(PROMPTS, GROUP).double(),
                exact_norms(model, rollout).view(PROMPTS, GROUP).double(),
                torch.tensor([ids.setdefault(problem.prompt, len(ids)) for problem in batch]),
            )
        )
        reinforce(model, optimizer, rollout, rewards, GROUP)

    outputs, gram = differentiate(model, tokenizer, study, FEW_OUTPUTS if steps < EARLY else OUTPUTS)
    prompt_ids = torch.tensor([ids[problem.prompt] for problem in study])
    stage = Stage(task, steps, outputs, prompt_ids, history, gram)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(stage, path)
    return path


def differentiate(model: Any, tokenizer: Any, study: list[Problem], num: int) -> tuple[list[Outputs], Tensor]:
    """Sample ``num`` outputs of each prompt; gradients of the log-probs of their tokens, equal beginnings once."""
    rollout, rewards = roll_out(model, tokenizer, study, num)
    mask = rollout["completion_mask"]
    tokens = rollout["input_ids"][:, -mask.shape[1] :].masked_fill(~mask, -1)
    outputs, gradients, num_nodes = [], [], 0
    for q in range(len(study)):
        rows = slice(q * num, (q + 1) * num)
        distinct, index, counts = torch.unique(tokens[rows], dim=0, return_inverse=True, return_counts=True)
        first = torch.stack([(index == u).nonzero()[0, 0] for u in range(len(distinct))]) + rows.start
        selected = {name: tensor[first] for name, tensor in rollout.items()}
        nodes, row_of, token_of = prefix_tree(distinct)
        one = {name: tensor[row_of] for name, tensor in selected.items()}
        chosen = torch.nn.functional.one_hot(token_of, mask.shape[1]).bool()
        gradients.append(token_gradients(model, one | {"completion_mask": chosen}))
        token_weights, head_weights = proxies(model, selected)
        outputs.append(
            Outputs(
                counts.double() / num, rewards[first].double(), torch.where(nodes < 0, -1, nodes + num_nodes),
                token_weights, head_weights,
            )
        )  # fmt: skip
        num_nodes += len(row_of)
    return outputs, inner_products(gradients)


def prefix_tree(distinct: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number the distinct beginnings: node of each token ``[U, T]``, and a row and a place where each is found."""
    numbers: dict[tuple[int, ...], int] = {}
    nodes = torch.full_like(distinct, -1)
    rows, places = [], []
    for u, row in enumerate(distinct.tolist()):
        for t, token in enumerate(row):
            if token < 0:
                break
            prefix = tuple(row[: t + 1])
            if prefix not in numbers:
                numbers[prefix] = len(numbers)
                rows.append(u)
                places.append(t)
            nodes[u, t] = numbers[prefix]
    return nodes, torch.tensor(rows), torch.tensor(places)


def token_gradients(model: Any, rollout: Rollout) -> Tensor:
    """Gradient of the masked sum of log-probs of every row, ``[rows, parameters]``."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def log_prob(parameters: dict[str, Tensor], one: Rollout) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, parameters, args, kwargs)

        return sequence_log_probs(call, {name: tensor[None] for name, tensor in one.items()}).sum()

    gradients = torch.func.vmap(torch.func.grad(log_prob), (None, 0), chunk_size=64)(parameters, rollout)
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)


@torch.no_grad()
def proxies(model: Any, rollout: Rollout) -> tuple[Tensor, Tensor]:
    mask = rollout["completion_mask"]
    logits, tokens = completion_logits(model, rollout)
    weights = logit_grad_norms(logits, tokens, mask).double()
    positions = (rollout["attention_mask"].cumsum(1) - 1).clamp_min(0)
    hidden = model.model(
        input_ids=rollout["input_ids"], attention_mask=rollout["attention_mask"], position_ids=positions
    ).last_hidden_state[:, -mask.shape[1] - 1 : -1]
    return weights, (weights * hidden.double().square().sum(-1)).sum(1)


def inner_products(gradients: list[Tensor]) -> Tensor:
    """``G G^T`` of all rows, of which there are too many to put into one tensor."""
    ends = torch.tensor([0, *map(len, gradients)]).cumsum(0).tolist()
    parts = [slice(start, end) for start, end in pairwise(ends)]
    gram = gradients[0].new_empty(ends[-1], ends[-1])
    for i, left in enumerate(gradients):
        for j, right in enumerate(gradients[: i + 1]):
            gram[parts[i], parts[j]] = left @ right.T
            gram[parts[j], parts[i]] = gram[parts[i], parts[j]].T.clone()
    return gram


def build_all(folder: Path, tasks: list[str], stages: list[int] | None = None, jobs: int = 2) -> list[Path]:
    """Files of the stages, built where they are not there yet."""
    wanted = [
        (task, steps, folder)
        for task in tasks
        for steps in STAGES[task]
        if (steps not in CONVERGED if stages is None else steps in stages)
    ]
    context = multiprocessing.get_context("spawn")
    paths = []
    with progress(len(wanted)) as report, context.Pool(jobs, torch.set_num_threads, (1,)) as pool:
        for path in pool.imap(build, wanted):
            paths.append(path)
            report(f"stage {path.stem}")
    return paths


def load(path: Path) -> Stage:
    """A stage whose sampled outputs are all that its policy has."""
    stage = torch.load(path, weights_only=False)  # written by `build`, here
    assert isinstance(stage, Stage)
    centre(stage.gram, stage.outputs)
    return stage


def centre(gram: Tensor, outputs: list[Outputs]) -> None:
    """Make the gradients those of the policy that has these outputs alone, in place.

    It takes each next token as often as the sample did, times ``pi_theta / pi_theta_0`` of the token, normalised. The
    gradient of such a log-probability is that of ``log pi_theta`` less its mean over the tokens that may come instead,
    and has mean zero after every beginning: what makes baselines unbiased.
    """
    sibling, share = siblings(outputs, len(gram))
    for _ in range(2):  # rows, then columns
        means = gram.new_zeros(int(sibling.max()) + 1, len(gram)).index_add_(0, sibling, share[:, None] * gram)
        for rows in torch.arange(len(gram)).split(1024):
            gram[rows] -= means[sibling[rows]]
        gram.t_()


def siblings(outputs: list[Outputs], num_nodes: int) -> tuple[Tensor, Tensor]:
    """For each node the number of its beginning, and how often it comes next there."""
    mass, parent = torch.zeros(num_nodes), torch.zeros(num_nodes, dtype=torch.long)
    for q, o in enumerate(outputs):
        kept = o.nodes >= 0
        mass.index_add_(0, o.nodes[kept], o.probability[:, None].expand_as(o.nodes)[kept].float())
        before = torch.cat([torch.full_like(o.nodes[:, :1], num_nodes + q), o.nodes[:, :-1]], dim=1)
        parent[o.nodes[kept]] = before[kept]
    of_parent = torch.cat([mass, torch.ones(len(outputs))])[parent]
    return torch.unique(parent, return_inverse=True)[1], mass / of_parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--stages", type=int, nargs="+", help="by their supervised steps")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/policy_stages"))
    args = parser.parse_args()
    for path in build_all(args.out, args.tasks, args.stages, args.jobs):
        stage = load(path)
        print(f"{path.stem}: pass rate {stage.pass_rate:.3f}, {len(stage.gram)} distinct beginnings of outputs")


if __name__ == "__main__":
    from benchmarks import policy_stages  # by its own name, so that what is saved can be loaded from elsewhere

    policy_stages.main()
