"""Guards HTTP servers: keys, deadlines, limits of requests.

Start at `gate`.
May import: `cluster`, `storage`.
"""
