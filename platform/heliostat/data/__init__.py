"""Orders samples as a function of the step, streams them with Ray Data, and writes receipts.

Start at `order`.
May import: `config`, `storage`.
"""
