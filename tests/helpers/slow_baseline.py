"""The baseline once more, from its definition: Python floats, dicts and loops, nothing shared with the library."""

from __future__ import annotations

import math

KAPPAS = (0.0, 1.0, 4.0, 16.0, 64.0, 256.0, math.inf)
RECALL = (0.0, 0.3, 1.0)


class SlowBaseline:
    """``kappa`` a number or "auto"; a batch is a list of dicts: reward, weight, group, and maybe prompt."""

    def __init__(self, kappa, decay):
        self.auto, self.kappas = kappa == "auto", KAPPAS if kappa == "auto" else (kappa,)
        self.alone = kappa == 0.0  # scope "group": there is no pool
        self.decay = decay
        self.batches = []  # all that were learned
        self.losses, self.gains, self.squares = {}, {}, {}
        self.memory = {}

    # ---- what is known of the past
    def past(self):
        """(weight, output) of every scored output ever learned from."""
        ages = range(len(self.batches) - 1, -1, -1)
        return [(self.decay**age, o) for age, batch in zip(ages, self.batches, strict=True) for o in scored(batch)]

    def losses_by_group(self, batch, candidate):
        losses = {}
        for i, o in enumerate(batch):
            loss = o["weight"] * (o["reward"] - self.one(batch, i, *candidate)) ** 2 if is_scored(o) else 0.0
            losses[o["group"]] = losses.get(o["group"], 0.0) + loss
        return list(losses.values())

    # ---- the baseline
    def one(self, batch, i, kappa, recall):
        me = batch[i]
        own = [(1.0, o) for j, o in enumerate(batch) if o["group"] == me["group"] and j != i and is_scored(o)]
        pool = [(1.0, o) for o in scored(batch) if o["group"] != me["group"]] + self.past()
        n = math.fsum(c for c, _ in pool)
        mean_weight = math.fsum(c * o["weight"] for c, o in pool) / n if n else 0.0
        wr, w, r, u = sums(own)
        if "prompt" in me and me["prompt"] in self.memory:
            old = self.memory[me["prompt"]]
            wr, w = wr + recall * old[0] * mean_weight, w + recall * old[1] * mean_weight
            r, u = r + recall * old[2], u + recall * old[3]
        if n and u == 0 and not self.alone:
            return mean(*sums(pool))  # with nothing of its own to go by the pool decides, whatever kappa
        if n:
            prior = mean(*sums(pool))
            plain = math.fsum(c * o["reward"] for c, o in pool) / n
            if kappa == math.inf:
                wr, w, r, u = mean_weight * prior, mean_weight, plain, 1.0
            else:
                wr, w = wr + kappa * mean_weight * prior, w + kappa * mean_weight
                r, u = r + kappa * plain, u + kappa
        return mean(wr, w, r, u)

    def candidates(self):
        return [(k, m) for k in self.kappas for m in RECALL]

    def default(self):
        return (64.0 if 64.0 in self.kappas else self.kappas[0], RECALL[0])

    def score(self, c):
        return self.gains.get(c, 0.0) - 2 * math.sqrt(self.squares.get(c, 0.0)) if c != self.default() else 0.0

    def choice(self):
        return max([self.default(), *self.candidates()], key=self.score)  # the first of equal ones

    def __call__(self, batch, choice=None):
        return [self.one(batch, i, *(choice or self.choice())) for i in range(len(batch))]

    def update(self, batch):
        if self.auto or any("prompt" in o for o in batch):
            losses = {c: self.losses_by_group(batch, c) for c in self.candidates()}
            for c in self.candidates():
                gains = [before - now for before, now in zip(losses[self.default()], losses[c], strict=True)]
                self.losses[c] = 0.99 * self.losses.get(c, 0.0) + math.fsum(losses[c])
                self.gains[c] = 0.99 * self.gains.get(c, 0.0) + math.fsum(gains)
                self.squares[c] = 0.99**2 * self.squares.get(c, 0.0) + math.fsum(gain**2 for gain in gains)
        self.batches.append(batch)
        past = self.past()
        n = math.fsum(c for c, _ in past)
        mean_weight = math.fsum(c * o["weight"] for c, o in past) / n if n else 0.0
        visited = {}
        for o in batch:
            if "prompt" in o:
                visited.setdefault(o["prompt"], []).append((1.0, o))
        for prompt, outputs in visited.items():
            wr, w, r, u = sums([(c, o) for c, o in outputs if is_scored(o)])
            relative = (wr / mean_weight, w / mean_weight) if mean_weight else (0.0, 0.0)
            old = self.memory.get(prompt, (0.0,) * 4)
            self.memory[prompt] = tuple(0.7 * a + b for a, b in zip(old, (*relative, r, u), strict=True))


def is_scored(output):
    return not math.isnan(output["reward"])


def scored(batch):
    return [o for o in batch if is_scored(o)]


def sums(weighted):
    return (
        math.fsum(c * o["weight"] * o["reward"] for c, o in weighted),
        math.fsum(c * o["weight"] for c, o in weighted),
        math.fsum(c * o["reward"] for c, o in weighted),
        math.fsum(c for c, _ in weighted),
    )


def mean(wr, w, r, n):
    return wr / w if w > 0 else r / n if n > 0 else 0.0
