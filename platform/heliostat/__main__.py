"""Runs the command `heliostat` as `python -m heliostat`: what a job on a cluster starts, as the script may not be on the path."""

from heliostat.cli.main import main

main()
