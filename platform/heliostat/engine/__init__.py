"""Builds the DeepSpeed engine, and reads and writes the state that ZeRO shards.

Start at `deepspeed_engine`.
May import: `checkpoint`, `config`, `data`, `optim`, `parallel`, `recipes`.
"""
