"""Scripts that train, to read, run and copy: ``python -m examples.NAME``, from the root of the repository.

In ``qwen3_arithmetic`` (one process), ``ddp_fsdp`` (several) and ``trl_grpo`` (TRL's trainer) stands the function to
copy; ``prime_rl_loss`` and the folder ``verl`` are files for those code bases. Parts that scripts share are in
``common``.
"""
