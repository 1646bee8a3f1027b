"""Predicts memory, step time, and cost of a job, and chooses a parallelism configuration.

Start at `planner`.
May import: `checkpoint`, `cluster`, `config`, `data`, `engine`, `optim`, `parallel`, `recipes`, `runs`, `storage`,
`validation`.
"""
