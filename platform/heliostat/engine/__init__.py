"""Builds the DeepSpeed engine, and reads and writes the state that ZeRO shards.

Start at `deepspeed_engine`.
May import: `checkpoint`, `config`, `cpu_kernels`, `data`, `optim`, `parallel`, `recipes`.
"""
