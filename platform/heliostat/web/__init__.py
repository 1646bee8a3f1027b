"""Guards HTTP servers: requires keys, and limits the time and size of requests.

Start at `gate`.
May import: `cluster`, `storage`.
"""
