"""Writes exercises whose answers a program can check: conversations to learn from, pairs of answers, and a held-out task.

python jobs/examples/arithmetic.py                               # needs reasoning-gym
"""

import json
import random
from pathlib import Path

from reasoning_gym import create_dataset

RAW, SUITE = Path(".heliostat/raw/arithmetic"), Path("suites/arithmetic")
LEARN, PAIRS, TEST = 1600, 600, 1000
SLIPS = (-10, -1, 1, 10)  # a wrong digit in the result


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def answer(question: str, result: int) -> dict[str, str]:
    return {"role": "assistant", "content": f"{question.partition(': ')[2]} {result}"}  # such as 12 + 34 = 46


exercises = create_dataset("chain_sum", size=12_000, seed=7, min_terms=2, max_terms=2, min_digits=1, max_digits=2)
once = list({one["question"]: int(one["answer"]) for one in exercises}.items())  # no question is in two parts
test, paired, learn = once[:TEST], once[TEST : TEST + PAIRS], once[TEST + PAIRS :][:LEARN]
slips = random.Random(7).choices(SLIPS, k=PAIRS)

write(SUITE / "test.jsonl", [{"question": q, "answer": str(a)} for q, a in test])
write(RAW / "learn.jsonl", [{"messages": [user(q), answer(q, a)]} for q, a in learn])
write(
    RAW / "pairs.jsonl",
    [
        {"prompt": [user(q)], "chosen": [answer(q, a)], "rejected": [answer(q, a + slip)]}
        for (q, a), slip in zip(paired, slips, strict=True)
    ],
)
print(f"{len(learn)} conversations, {len(paired)} pairs, {len(test)} held-out questions")
