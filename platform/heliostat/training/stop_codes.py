"""Defines the codes of a stop that the workers agree on; the highest wins."""

RUN, RESIZE, PREEMPTED, INTERRUPTED = 0, 1, 2, 3
FAILED = 4  # a save failed on some worker: all hear of its error, and continue without it or raise it
STOPS = {RESIZE: "resize", PREEMPTED: "preempted", INTERRUPTED: "interrupted"}
