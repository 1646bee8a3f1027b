"""A function for a process of its own that does the worst."""

import os
import time


def worst(keys):
    def work(about, data):
        what = about["do"]
        if what == "crash":
            os.abort()
        if what == "exit":
            os._exit(3)
        if what == "hang":
            while True:
                pass
        if what == "compute":
            end = time.process_time() + 0.2
            while time.process_time() < end:
                pass
        if what == "sleep":
            time.sleep(60)
        if what == "memory":
            bytearray(4 << 30)
        if what == "raise":
            raise ValueError("no")
        return {"seen": len(data)}, keys["mark"].encode()

    return work
