"""Reads and writes locations, local or S3: records, leases, conditional writes, retries.

Start at `locations`.
May import: no other room.
"""

from heliostat import extras

# users' pipelines import `Location` from here, because this package was once a module
__getattr__, __dir__ = extras.lazy_names(__name__, {"Location": "heliostat.storage.locations"})
