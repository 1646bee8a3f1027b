"""`python -m heliostat` is the command `heliostat`: what a job on a cluster starts, where the script may not be on the path."""

from heliostat.cli.main import main

main()
