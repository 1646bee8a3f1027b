"""Reads and writes locations, local or S3: records, leases, conditional writes, retries.

Start at `locations`.
May import: no other room.
"""
