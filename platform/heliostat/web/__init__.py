"""Protects HTTP servers: requires keys, and limits how long and how large requests are.

Start at `gate`.
May import: `cluster`, `storage`.
"""
