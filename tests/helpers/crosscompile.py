"""Compile a Triton kernel to machine code for a GPU that is not there, and read what it uses."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from snr_kernels._triton import launch_options
from snr_kernels.linear_grad_norms import _triton as linear_grad_norms_triton
from snr_kernels.logprob_stats import _triton as logprob_stats_triton
from snr_kernels.norm_embedding_grad_norms import _triton as norm_embedding_grad_norms_triton

MODULES = {  # and how many configurations each has
    logprob_stats_triton: 60,
    linear_grad_norms_triton: 8,
    norm_embedding_grad_norms_triton: 19,
}
# backend, architecture, threads a warp, shared memory one program may have
TARGETS = {
    "sm_80": ("cuda", 80, 32, 166_912),
    "sm_90": ("cuda", 90, 32, 232_448),
    "sm_100": ("cuda", 100, 32, 232_448),
    "gfx942": ("hip", "gfx942", 64, 65_536),
}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DATA = {"logits", "gradient", "activations", "gradient_0", "gradient_1", "gradient_2", "inputs", "gradients"}
# Pointers by their names: in the dtype of the configuration, to int64, and to what is float32 whatever the inputs are.
INTEGERS = {"labels", "cu_seqlens", "cu_programs", "sequences", "order", "first", "last"}
FLOAT32 = {
    "complement", "entropy", "grad_entropy", "grad_log_prob", "grad_norm", "grad_norm_squared", "grad_sum_p_squared",
    "log2_total", "log_prob", "partial", "reference_of_row", "squares", "sum_p_squared", "sums", "temperature",
}  # fmt: skip


def compile_for(target, configuration, **options):
    """Bytes of shared memory, and of registers spilled to memory."""
    backend, architecture, warp, _ = TARGETS[target]
    kernel, dtype, constants = configuration[:3]
    signature, attributes = {}, {}
    for parameter in kernel.params:
        if parameter.name in constants:
            signature[parameter.name] = "constexpr"
        elif parameter.annotation_type:
            signature[parameter.name] = parameter.annotation_type
        else:  # a pointer; allocations are aligned, views of them may not be
            name = parameter.name
            known = {
                **dict.fromkeys(FLOAT32, "fp32"),
                **dict.fromkeys(INTEGERS, "i64"),
                **dict.fromkeys(DATA, TYPES[dtype]),
            }
            assert name in known, f"{name}: name this pointer in DATA, INTEGERS or FLOAT32; annotate what is a number"
            signature[name] = "*" + known[name]
            if name != "logits" or constants.get("ALIGNED", False):
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {**launch_options(configuration, hip=backend == "hip"), **options}
    compiled = triton.compile(source, target=GPUTarget(backend, architecture, warp), options=options)
    if backend == "hip":
        assert re.search(r"global_store|buffer_store", compiled.asm["amdgcn"]), "nothing is computed"
        found = re.findall(r"\.(?:[vs]gpr_spill_count|private_segment_fixed_size):\s+(\d+)", compiled.asm["amdgcn"])
    else:
        assert "st.global" in compiled.asm["ptx"], "nothing is computed"  # tensor memory of sm_100 that ran out
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
    target, module, number = job
    return compile_for(target, list(importlib.import_module(module).configurations())[number])


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
