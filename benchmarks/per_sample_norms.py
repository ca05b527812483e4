"""Norms of the gradients of single sequences, beside the training gradient: time and memory of every way to have both.

    python -m benchmarks.per_sample_norms                      # a quarter of an hour on two cores
    python -m benchmarks.per_sample_norms --models 30M --turns 3
    python -m benchmarks.per_sample_norms --device cuda        # Qwen3 0.6B, 4B, 8B from their configurations

Ways take turns in one process, so that a slow minute of the machine slows all of them. Each does one forward pass and
leaves the training gradient in ``.grad``; the overhead is over the step that does nothing else. Models are untied, as
Opacus takes no others; BackPACK has no rule for any norm, so it gets a model without. On a GPU weights are
bfloat16 and activations are checkpointed, which vmap refuses.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from benchmarks.harness import (
    Row,
    conclude,
    environment,
    parse_arguments,
    peak_memory,
    progress,
    refusal,
    release,
    version,
    write_json,
)
from snr_kernels.logprob_stats import logprob_stats
from snr_optim import PerSampleGradNorms

# hidden, intermediate, layers, heads, key-value heads, head_dim, vocabulary
QWEN3 = {
    "tiny": (16, 24, 1, 2, 1, 8, 31),
    "30M": (512, 1536, 7, 8, 4, 64, 8192),
    "125M": (768, 2304, 11, 12, 6, 64, 32_000),
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, 128, 151_936),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, 128, 151_936),
    "Qwen3-8B": (4096, 12_288, 36, 32, 8, 128, 151_936),
}
ON_CPU = [("30M", 8, 128), ("30M tied", 8, 128), ("125M", 8, 128), ("30M", 2, 512), ("no norms", 8, 128)]
ON_GPU = [
    (name, *batch)
    for name in ("Qwen3-0.6B", "Qwen3-4B", "Qwen3-8B")
    for batch in ((32, 256), (8, 1024), (4, 2048), (1, 8192))
]
CASES = {"cpu": ON_CPU, "cuda": ON_GPU, "small": [("tiny", 3, 5), ("tiny tied", 2, 6)]}
COLUMNS = ["model", "sequences", "tokens", "way", "seconds", "overhead", "peak_mib", "from_exact", "refused"]
OURS = ("exact", "sketch", "norms first")


def build(name: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    if name == "no norms":
        return NoNorms().to(device)
    from transformers import Qwen3Config, Qwen3ForCausalLM

    name, tied = name.removesuffix(" tied"), name.endswith(" tied")
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary = QWEN3[name]
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=tied,
        use_cache=False, pad_token_id=None,
    )  # fmt: skip
    gpu = device.type == "cuda"
    with device:
        model = Qwen3ForCausalLM._from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16 if gpu else torch.float32
        )
    if gpu:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return model


class NoNorms(nn.Module):
    """A language model of nothing but an embedding and linear layers, 30M parameters."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512), nn.ReLU()) for _ in range(10)]
        self.layers = nn.Sequential(
            nn.Embedding(8192, 512), *(layer for block in blocks for layer in block), nn.Linear(512, 8192)
        )

    def forward(self, input_ids: Tensor) -> Any:
        return argparse.Namespace(logits=self.layers(input_ids))


def log_prob_sum(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """Of each sequence, ``[B]``."""
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    return logprob_stats(model(input_ids=ids).logits, labels, outputs=["log_prob"]).log_prob.sum(1)


# ------------------------------------------------------------------------------------------------------------- the ways
class Way:
    """How to get gradients, and norms in ``squared``."""

    squared: Tensor | None = None
    marks_model = False  # for good: the next way wants a new one

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.ids = model, ids

    def __enter__(self) -> Way:
        return self

    def __exit__(self, *exception: object) -> None:
        self.squared = None
        self.model.zero_grad()

    def step(self) -> None:
        log_prob_sum(self.model, self.ids).sum().backward()


class Exact(Way):
    """Norms on the training backward."""

    method = "exact"

    def __enter__(self) -> Way:
        self.norms = PerSampleGradNorms(self.model, self.method, check="never")
        return self

    def __exit__(self, *exception: object) -> None:
        self.norms.remove()
        super().__exit__()

    def step(self) -> None:
        loss = log_prob_sum(self.model, self.ids).sum()
        with self.norms.sequences(batch_size=len(self.ids)):
            loss.backward()
        self.squared = self.norms.squared()


class Sketch(Exact):
    """To ten percent; as fine as the errors of the steps before suggest."""

    method = "sketch"
    sizes: ClassVar[WeakKeyDictionary[nn.Module, int]] = WeakKeyDictionary()  # of each model, from turn to turn

    def __enter__(self) -> Way:
        super().__enter__()
        self.norms.sketch_size = self.sizes.get(self.model, self.norms.sketch_size)
        return self

    def __exit__(self, *exception: object) -> None:
        self.sizes[self.model] = self.norms.sketch_size
        super().__exit__()

    def step(self) -> None:
        super().step()
        self.error = float((self.norms.standard_error() / self.norms.squared()).square().mean().sqrt())


class Before(Exact):
    """Norms first, by a backward pass without weight gradients, as weights of the loss may depend on them."""

    def step(self) -> None:
        loss = log_prob_sum(self.model, self.ids).sum()
        with self.norms.sequences(batch_size=len(self.ids)):
            self.norms.backward(loss, retain_graph=True)
        self.squared = self.norms.squared()
        loss.backward()


class Opacus(Way):
    """Ghost clipping: a backward pass for the norms, another one for the gradient."""

    def __enter__(self) -> Way:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        self.wrapped = GradSampleModuleFastGradientClipping(
            self.model, strict=False, loss_reduction="sum", use_ghost_clipping=True, max_grad_norm=1.0
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self.wrapped.to_standard_module()
        super().__exit__()

    def step(self) -> None:
        self.wrapped.enable_hooks()
        loss = log_prob_sum(self.wrapped, self.ids).sum()
        loss.backward(retain_graph=True)
        self.squared = self.wrapped.get_norm_sample().square()
        self.wrapped.zero_grad()
        self.wrapped.disable_hooks()
        loss.backward()


class BackPack(Way):
    """Squared norms on one backward pass, of models whose layers it all knows."""

    marks_model = True

    def __enter__(self) -> Way:
        import backpack

        self.model = backpack.extend(self.model)
        return self

    def step(self) -> None:
        import backpack
        from backpack.extensions import BatchL2Grad

        with backpack.backpack(BatchL2Grad()):
            log_prob_sum(self.model, self.ids).sum().backward()
        self.squared = torch.stack([p.batch_l2 for p in self.model.parameters()]).sum(0)


class Vmap(Way):
    """The gradient of every sequence in full, ``vmap(grad)``; the training gradient is their sum.

    With plain attention: vmap takes the fused one in pieces, and is slower with it.
    """

    def __enter__(self) -> Way:
        self.attention("eager")
        return self

    def __exit__(self, *exception: object) -> None:
        self.attention("sdpa")
        super().__exit__()

    def attention(self, kind: str) -> None:
        if not isinstance(self.model, NoNorms):
            self.model.set_attn_implementation(kind)  # type: ignore[operator]

    def step(self) -> None:
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}

        def loss(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
            def call(**inputs: Tensor) -> Any:
                return torch.func.functional_call(self.model, parameters, (), inputs)

            return log_prob_sum(call, ids[None]).sum()

        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, self.ids)
        self.squared = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
        for name, p in self.model.named_parameters():
            p.grad = gradients.pop(name).sum(0)


WAYS = {
    "plain": Way, "exact": Exact, "sketch": Sketch, "norms first": Before, "Opacus": Opacus, "BackPACK": BackPack,
    "vmap(grad)": Vmap,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ measuring
def measure(case: tuple[str, int, int], ways: list[str], turns: int, device: torch.device, report: Any) -> list[Row]:
    name, sequences, tokens = case
    release(device)  # the model of the case before
    model = build(name, device)
    vocabulary = 8192 if name == "no norms" else QWEN3[name.removesuffix(" tied")][-1]
    ids = torch.randint(vocabulary, (sequences, tokens), device=device)
    times: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, int | None] = {}
    norms: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    errors: float | None = None
    for turn in range(-1, turns):
        for way in ways:
            if way in refused:
                continue
            try:
                with WAYS[way](model, ids) as one:
                    if turn < 0:  # warm up, and look at the memory
                        one.step()
                        model.zero_grad()
                        gc.collect()
                        peaks[way] = peak_memory(one.step, device)
                        if one.squared is not None:
                            norms[way] = one.squared.double()
                    else:
                        times[way].append(clock(one.step, device))
                        errors = getattr(one, "error", errors)
            except Exception as error:  # peers refuse in many ways; memory may not do
                refused[way] = refusal(error)
            if way in refused or WAYS[way].marks_model:
                del model  # first: there may be no room for two
                release(device)
                model = build(name, device)
            report(f"{name} {sequences} x {tokens}: {way}, turn {turn + 1} of {turns}")
    rows = []
    exact = norms.get("exact")
    for way in ways:
        row: Row = {"model": name, "parameters": sum(p.numel() for p in model.parameters()), "sequences": sequences}
        row |= {"tokens": tokens, "way": way, "refused": refused.get(way)}
        if way not in refused:
            row["seconds"] = median(times[way])
            if "plain" not in refused:
                over = [b / a - 1 for a, b in zip(times["plain"], times[way], strict=True)]
                row |= {"overhead": median(over), "least": min(over), "most": max(over)}
            row["peak_mib"] = None if peaks[way] is None else peaks[way] / 2**20  # type: ignore[operator]
            if way in norms and exact is not None:
                row["from_exact"] = float((norms[way] / exact - 1).abs().max())
            if way == "sketch":
                row["standard_error"] = errors
        rows.append(row)
    return rows


def clock(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="of the cases of the device")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--turns", type=int, help="7; 1 of small sizes")
    args = parse_arguments(parser, "per_sample_norms")
    device, turns = args.device, args.turns or (1 if args.small else 7)
    origin = environment(device) | {name: version(name) for name in ("opacus", "backpack-for-pytorch")}
    cases = [case for case in CASES[args.sizes] if not args.models or case[0] in args.models]
    if not cases:
        parser.error(f"--models: expected some of {', '.join(dict.fromkeys(case[0] for case in CASES[args.sizes]))}")
    ways = ["plain", *(way for way in args.ways if way != "plain")]
    rows: list[Row] = []
    with progress(len(cases) * len(ways) * (turns + 1)) as report:
        for case in cases:
            rows += measure(case, ways, turns, device, report)
            write_json(args.json, "per_sample_norms", origin, rows=rows)
    conclude(rows, COLUMNS, lambda row: row["way"] in ("plain", *OURS))


if __name__ == "__main__":
    main()
