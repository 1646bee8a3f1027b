"""Replaces the dashboard's agent in a Ray without a dashboard. This agent reports to the raylet that it has no ports, and ends
when the raylet ends.

A raylet waits for its agent's ports. Ray's own agent reports its ports only after it has imported modules, which takes seconds.
If two Rays run on a machine, the second Ray's agent also tries for three seconds to get a port that the first Ray uses. This
module imports very little.
"""

import os
import sys
import time

PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
NONE = "-1"  # Ray's own value for an installation without a dashboard
LOOK_S = 1.0


def main() -> None:
    options = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:])
    raylet = os.getppid()
    for port in PORTS:
        place = os.path.join(options["session-dir"], f"{port}_{options['node-id']}")  # noqa: PTH118 (pathlib takes 10 ms)
        with open(f"{place}.quiet", "w") as file:  # noqa: PTH123
            file.write(NONE)
        os.rename(f"{place}.quiet", place)  # noqa: PTH104
    while os.read(0, 1):  # the raylet has the other end of standard input open
        pass
    while os.getppid() == raylet:
        time.sleep(LOOK_S)


if __name__ == "__main__":
    main()
