"""The baseline as users hold it: what it may look at, how far it shrinks, and what it keeps from batch to batch."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from snr_optim.baseline.distributed import gather
from snr_optim.baseline.estimator import Sums, VisibleSums, baselines, losses, pooled, totals_of
from snr_optim.baseline.history import CandidateSelection, Pool, PromptMemory, load_state, move, state_of
from snr_optim.baseline.inputs import Batch, check

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SCOPES = ("group", "batch", "shrink")
KAPPAS = (0.0, 1.0, 4.0, 16.0, 64.0, 256.0, math.inf)  # outputs
DEFAULT_KAPPA = 64.0  # unless there is evidence for another
RECALL = (0.0, 0.3, 1.0)  # share of a prompt's remembered outputs that counts


class GradWeightedBaseline(nn.Module):
    r"""The gradient-weighted baseline of OBLR-PO, estimated without the output that it is subtracted from.

    .. math::
        b^*(q) = \frac{E[w\,r \mid q]}{E[w \mid q]}, \qquad
        b_i = \frac{\sum_{j \in q,\, j \neq i} w_j r_j + \kappa\, \overline{w r}_{-q}}
                   {\sum_{j \in q,\, j \neq i} w_j + \kappa\, \overline{w}_{-q}}, \qquad
        w = \|\nabla_\theta \log \pi_\theta(o \mid q)\|^2

    ``b*`` minimises the trace of the covariance of the gradient among constants (arXiv 2511.23310,
    theorem 7). Its estimate ``b_i`` uses the other outputs ``j`` of the prompt, and as ``kappa``
    pseudo-outputs the means over a pool ``-q``: the *other prompts* of the batch, and the batches
    that :meth:`update` was given before.

    - ``scope="group"``, ``kappa = 0``: the paper's leave-one-out estimate. Rare outputs with large weights are not
      among the few others, so it misses most of what ``b*`` is worth.
    - ``scope="batch"``, ``kappa = inf``: the pool alone.
    - ``scope="shrink"``: the group's estimate drawn toward the pool. With ``kappa="auto"`` it is 64, unless
      another one had surely less ``sum w (r - b)^2`` over *earlier* batches, the part of the variance that depends on
      ``b``: what :meth:`update` is for.

    In every scope ``b_i`` depends on other outputs and on the past, never on output ``i``, so
    ``(r_i - b_i) grad log pi(o_i)`` keeps its mean *exactly*, as long as the outputs of a batch are independent draws
    and what is said of each depends on it alone: no row twice (padding), no rows of one rollout as outputs of their own
    (pass the rollout, and repeat its advantage), no reward relative to others of the group, no NaN for outputs that
    were cut off because of what they are, no clipped ratios, no loss divided by the length of an output. Prompts whose
    rewards are all alike may be dropped or skipped in scope ``"group"``, where their advantages are 0, and must be kept
    in the others.

    The weights choose the rest of the family:

    ========================================= ==================================================================
    ``weights``, in scope ``"group"``         is
    ========================================= ==================================================================
    per-sample gradient norms                 OBLR-PO (:func:`~snr_optim.per_sample_grad_norms_func`)
    ``logit_grad_norms(...).sum(1)``          the sequence form of Optimal Token Baseline (arXiv 2602.07078)
    lengths                                   OPO (arXiv 2505.23585), leave-one-out
    none                                      RLOO (arXiv 2402.14740)
    rewards-to-go ``[B, T]``, weights summed  Optimal Token Baseline; with ``leave_one_out=False`` as published
    over the tokens up to each
    ========================================= ==================================================================

    Args:
        scope: ``"shrink"``, ``"batch"`` or ``"group"``.
        leave_one_out: ``False`` puts each output (and its prompt into the pool) into its own baseline. That
            is **biased**; it is here to compare with methods that do it.
        kappa: strength of the shrinkage in pseudo-outputs, or ``"auto"``; used by ``"shrink"`` alone.
        decay: what is kept of the pool of earlier batches when :meth:`update` adds the next one; ``0`` keeps that one
            alone. The other prompts of the current batch count fully. Where the policy passes nearly always ``b*``
            moves fast, and a long memory lags behind it.
        process_group: of data-parallel ranks, each of which passes its own part of the batch. Groups may be split over
            ranks if ``groups`` are ids, which then have to mean the same prompt on all ranks; a size stays with its
            rank. Every rank gathers all rewards and weights (``[B, T]``: of all tokens). All ranks have to ask alike.
            Left out, the outputs that are passed are all there are.

    Raises:
        ValueError: an unknown ``scope``; ``kappa`` neither ``"auto"`` nor positive and finite; ``decay`` outside
            [0, 1).

    Example:
        >>> baseline = GradWeightedBaseline(scope="group")
        >>> rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
        >>> baseline(rewards, weights=torch.tensor([1.0, 1.0, 3.0, 1.0]), groups=4)
        tensor([0.2000, 0.4000, 0.6667, 0.2000])
        >>> baseline.advantages(rewards, groups=4)              # equal weights: RLOO
        tensor([ 0.6667, -0.6667, -0.6667,  0.6667])
    """

    def __init__(
        self,
        scope: Literal["shrink", "group", "batch"] = "shrink",
        leave_one_out: bool = True,
        *,
        kappa: float | Literal["auto"] = "auto",
        decay: float = 0.5,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if scope not in SCOPES:
            raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
        if not isinstance(leave_one_out, bool):
            raise TypeError(f"leave_one_out: expected a bool, got {leave_one_out!r}")
        if kappa != "auto" and not (_is_number(kappa) and 0 < float(kappa) < math.inf):
            raise ValueError(
                f"kappa: expected 'auto' or a positive finite number, got {kappa!r}; scope='group' is kappa = 0, "
                "scope='batch' is kappa = inf"
            )
        if not _is_number(decay) or not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay!r}")
        self.scope = scope
        self.leave_one_out = leave_one_out
        self.decay = float(decay)
        self.process_group = process_group
        kappas = {"group": (0.0,), "batch": (math.inf,), "shrink": KAPPAS}[scope]
        if scope == "shrink" and kappa != "auto":
            kappas = (float(kappa),)
        self._auto = len(kappas) > 1
        self._pool = Pool(self.decay)
        self._selection = CandidateSelection(kappas, RECALL, (kappas.index(DEFAULT_KAPPA) if self._auto else 0, 0))
        self._memory = PromptMemory()

    # ------------------------------------------------------------------------------------------------ for a batch
    def forward(
        self,
        rewards: Tensor,
        weights: Tensor | None = None,
        groups: int | Tensor | None = None,
        *,
        ratios: Tensor | None = None,
        prompts: Tensor | None = None,
    ) -> Tensor:
        """The baseline of each output, from this batch and those that :meth:`update` was given before it.

        Args:
            rewards: ``[B]``, one per output; NaN for one that was not scored, which then counts nowhere.
                Or ``[B, T]``: rewards-to-go, each column a problem of its own, NaN at padding. Not ``[P, G]``: flatten
                that, and let ``groups=G``.
            weights: squared score norms, of the shape of ``rewards``, non-negative; equal when left out.
                Only their ratios matter, over all batches.
            groups: size of every prompt's group (neighbours belong together), or integer ids ``[B]``; ``prompts``
                when left out.
            ratios: importance ratios ``c = pi / pi_old``, of the shape of ``rewards``: weights become ``c**2 * w``,
                which is best for gradients ``c_i (r_i - b_i) grad log pi(o_i)``. The factor ``c_i`` stays yours.
            prompts: ``[B]`` integer ids that a prompt keeps over epochs. Its earlier outputs count beside the other
                outputs of the group, where that has done better so far. Five numbers are kept for each prompt, for
                good; a visit counts 0.7 times the next one. Batches without ``prompts`` may come between.

        Returns:
            Like ``rewards``, float32 at least, without gradient. Weights that are all zero wherever an
            output's baseline looks count as equal. Where a prompt has no other scored output the pool
            decides; in scope ``"batch"`` with an empty pool, the prompt's own other outputs. With nothing to go by, as
            for a group of one in scope ``"group"``, the baseline is 0.

        Raises:
            TypeError: complex tensors; ``groups`` or ``prompts`` that are no integers.
            ValueError: shapes that disagree; infinite rewards; weights negative, NaN or infinite; several ``prompts``
                in one group; ``prompts`` without ``scope="shrink"`` or with ``[B, T]``.
        """
        batch, rows = self._checked(rewards, weights, groups, ratios, prompts)
        return self._chosen(batch, self._look(batch))[rows].to(_dtype_of(rewards))

    def advantages(
        self,
        rewards: Tensor,
        weights: Tensor | None = None,
        groups: int | Tensor | None = None,
        *,
        ratios: Tensor | None = None,
        prompts: Tensor | None = None,
        update: bool = False,
    ) -> Tensor:
        """``rewards - baseline``; 0 where the reward is NaN. Arguments, errors and dtype as in :meth:`forward`.

        With ``update=True`` it then learns from the batch, as :meth:`update` does. Once per batch, and advantages
        first: a baseline that has learned from an output is no longer independent of it.
        """
        batch, rows = self._checked(rewards, weights, groups, ratios, prompts)
        visible = self._look(batch)
        advantages = self._chosen(batch, visible, subtract=True)[rows]
        if update:
            self._learn(batch, visible)
        return advantages.to(_dtype_of(rewards))

    def update(
        self,
        rewards: Tensor,
        weights: Tensor | None = None,
        groups: int | Tensor | None = None,
        *,
        ratios: Tensor | None = None,
        prompts: Tensor | None = None,
    ) -> None:
        """Let later batches know this one: their pool, the evidence for ``kappa``, the outputs of its prompts.

        Once per batch, after its advantages were asked for. Load the state of a new baseline to forget everything.
        In scope ``"group"`` there is nothing to learn. Arguments and errors as in :meth:`forward`.
        """
        batch, _ = self._checked(rewards, weights, groups, ratios, prompts)
        self._learn(batch, self._look(batch))

    # ------------------------------------------------------------------------------------------- before the outputs
    def predict(self, prompts: Tensor | None = None) -> Tensor:
        """The baseline from earlier batches alone: known before a prompt's outputs are sampled or weighed.

        With it a single backward pass can give the gradient and the exact norms, which then go to :meth:`update`. In
        scope ``"group"`` nothing is kept, and the prediction is 0.

        Args:
            prompts: ``[P]`` integer ids, of those to predict for.

        Returns:
            ``[P]`` float32 for ``prompts``, on their device; else a scalar, or ``[T]`` after rewards-to-go, on that of
            the last batch. 0 before the first update.

        Example:
            >>> baseline = GradWeightedBaseline()
            >>> baseline.update(torch.tensor([1.0, 0.0]), weights=torch.tensor([1.0, 3.0]), groups=2)
            >>> baseline.predict()
            tensor(0.2500)
        """
        self._expect_supported(prompts)
        if prompts is None:
            return Sums.unstack(self._pool.sums).mean().float()
        if not isinstance(prompts, Tensor) or prompts.dim() != 1:
            raise TypeError("prompts: expected a tensor of integer ids [P]")
        if self._pool.sums.dim() > 1:
            raise ValueError("prompts: not remembered by a baseline of rewards-to-go [B, T]")
        move(self._parts(), prompts.device)
        batch = check(torch.full((len(prompts),), math.nan, device=prompts.device), None, 1, prompts=prompts)
        return self._chosen(batch, self._look(batch)).float()

    def metrics(self) -> dict[str, float]:
        """What has been chosen and how well it does: numbers to log (waits for the device).

        ``kappa``; ``recall``, the share of remembered outputs that counts; ``second_moment``: ``sum w (r - b)^2`` of
        that choice relative to ``kappa = 0``'s, the lower the better, over the batches seen so far (of few it says
        little), NaN without ``kappa="auto"`` or before the first; ``prompts_remembered``.
        """
        k, m = (int(index) for index in self._selection.best())
        losses, kappas = self._selection.losses, self._selection.kappas
        group = float(losses[0, 0]) if kappas[0] == 0 else math.nan
        return {
            "kappa": float(kappas[k]),
            "recall": RECALL[m],
            "second_moment": float(losses[k, m]) / group if group else math.nan,
            "prompts_remembered": float(len(self._memory.ids)),
        }

    # ---------------------------------------------------------------------------------------------------- the work
    def _checked(self, rewards: Any, weights: Any, groups: Any, ratios: Any, prompts: Any) -> tuple[Batch, slice]:
        """The whole batch of all ranks, and which rows of it are this rank's."""

        def local() -> Batch:
            self._expect_supported(prompts)
            return check(rewards, weights, groups, ratios, prompts)

        if self.process_group is None:
            batch, rows = local(), slice(None)
        else:
            batch, rows = gather(local, self.process_group)
        move(self._parts(), batch.rewards.device)
        return batch, rows

    def _expect_supported(self, prompts: Any) -> None:
        if prompts is not None and self.scope != "shrink":
            raise ValueError(f"prompts: remembered in scope 'shrink' alone, got scope {self.scope!r}")

    def _look(self, batch: Batch) -> VisibleSums:
        totals = totals_of(batch)
        if self.scope == "group":
            return VisibleSums(totals, None, None)
        prior = pooled(totals, Sums.unstack(self._pool.like(batch.rewards.shape[1:])), self.leave_one_out)
        recalled = None
        if batch.prompts is not None:
            relative = Sums.unstack(self._memory.recall(batch.prompts))
            recalled = Sums(relative.wr * prior.w, relative.w * prior.w, relative.r, relative.n)
        return VisibleSums(totals, prior, recalled)

    def _chosen(self, batch: Batch, visible: VisibleSums, subtract: bool = False) -> Tensor:
        """The baselines of the best candidate; with ``subtract`` the advantages."""
        k, m = self._selection.best()
        shrinkage = self._selection.shrinkages().take(k).to(batch.rewards)  # no index on the host: nothing to wait for
        share = self._selection.recall.take(m).to(batch.rewards)
        return baselines(batch, visible, self.leave_one_out, shrinkage, share, subtract=subtract)

    def _learn(self, batch: Batch, visible: VisibleSums) -> None:
        if self.scope == "group" or not len(batch.rewards):
            return
        if self._auto or batch.prompts is not None:
            shrinkages, shares = (t.to(batch.rewards) for t in (self._selection.shrinkages(), self._selection.recall))
            self._selection.update(losses(batch, visible, self.leave_one_out, shrinkages, shares))
        self._pool.update(visible.totals.map(lambda total: total.sum(0)).stacked())
        if batch.prompts is not None:
            mean_weight = Sums.unstack(self._pool.sums).per_output().w
            scale = 1 / mean_weight.clamp_min(1e-290 if mean_weight.dtype == torch.float64 else 1e-30)
            seen = visible.totals
            self._memory.update(batch.prompts, Sums(seen.wr * scale, seen.w * scale, seen.r, seen.n).stacked())

    # --------------------------------------------------------------------------------------------------- the state
    def _parts(self) -> dict[str, Any]:
        return {"pool": self._pool, "selection": self._selection, "memory": self._memory}

    def get_extra_state(self) -> dict[str, Tensor]:
        """All that was learned, as tensors that nobody else holds: loads with ``weights_only=True``.

        ``torch.distributed.checkpoint`` fills them in place. It refuses sizes that differ from those of a new baseline,
        as they do once prompts or rewards-to-go were remembered: keep such a state in a file of ``torch.save``.
        """
        return {name: value.clone() for name, value in state_of(self._parts()).items()}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take it over, bit for bit; the settings stay those of the constructor."""
        load_state(self._parts(), state)

    def extra_repr(self) -> str:
        kappa = "'auto'" if self._auto else float(self._selection.kappas[0])
        return f"scope={self.scope!r}, leave_one_out={self.leave_one_out}, kappa={kappa}, decay={self.decay}"


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _dtype_of(rewards: Tensor) -> torch.dtype:
    return torch.promote_types(rewards.dtype, torch.float32)
