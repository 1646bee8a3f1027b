"""Protects HTTP servers: requires API keys, and limits the duration and size of requests.

Start at `gate`.
May import: `cluster`, `storage`.
"""
