"""Compile a Triton kernel to machine code for a GPU that is not there, and read what it uses."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from snr_optim.kernels import logprob_stats_triton
from snr_optim.kernels.logprob_stats_triton import THREADS

# backend, architecture, threads a warp, shared memory one program may have
TARGETS = {
    "sm_80": ("cuda", 80, 32, 166_912),
    "sm_90": ("cuda", 90, 32, 232_448),
    "sm_100": ("cuda", 100, 32, 232_448),
    "gfx942": ("hip", "gfx942", 64, 65_536),
}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def compile_for(target, configuration, **options):
    """Bytes of shared memory, and of registers spilled to memory."""
    backend, architecture, warp, _ = TARGETS[target]
    kernel, dtype, constants = configuration
    signature, attributes = {}, {}
    for parameter in kernel.params:
        if parameter.name in constants:
            signature[parameter.name] = "constexpr"
        elif parameter.annotation_type:
            signature[parameter.name] = parameter.annotation_type
        else:  # a pointer; allocations are aligned, views of them may not be
            element = {"labels": "i64", "logits": TYPES[dtype], "gradient": TYPES[dtype]}.get(parameter.name, "fp32")
            signature[parameter.name] = "*" + element
            if parameter.name != "logits" or constants.get("ALIGNED", False):
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": THREADS // warp, **options}
    compiled = triton.compile(source, target=GPUTarget(backend, architecture, warp), options=options)
    if backend == "hip":
        found = re.findall(r"\.(?:[vs]gpr_spill_count|private_segment_fixed_size):\s+(\d+)", compiled.asm["amdgcn"])
    else:
        found = re.findall(r"(?:STACK|LOCAL):(\d+)", resource_usage(compiled.asm["cubin"]))
    assert found, "no resource usage reported"
    return compiled.metadata.shared, sum(map(int, found))


def resource_usage(cubin):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout


def compile_number(job):
    target, number = job
    return compile_for(target, list(logprob_stats_triton.configurations())[number])


def in_own_cache(folder):
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(dir=folder)
    os.environ["TRITON_HOME"] = os.environ["TRITON_CACHE_DIR"]


def compile_too_much(target):
    """With too few registers on NVIDIA, too many logits a thread on AMD."""
    configuration = logprob_stats_triton.for_grad_logits(torch.float32, True, True, True)
    if target.startswith("sm"):
        return compile_for(target, configuration, maxnreg=32)
    configuration.constants["BLOCK"] = 16_384
    return compile_for(target, configuration, num_warps=1)
