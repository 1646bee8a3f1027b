"""Posts to the driver what happens on a worker.

    posts.tell(Evaluation(...))     # not to be lost: kept until a checkpoint holds it, too
    posts.notice("...")             # a line at the terminal

Nothing waits for the driver: an event is sent, and lost if nobody is there.
"""

from __future__ import annotations

from typing import Any

from heliostat.runs.events import Event, Notice


class Posts:
    """Posts rank 0's events, of what all workers know alike.

    `mailbox`: the driver's, an actor; None where nobody listens. `told`: events since the last checkpoint that must not be lost,
    even if the driver dies before it has them.
    """

    def __init__(self, mailbox: Any, rank: int) -> None:
        self.mailbox, self.rank = mailbox, rank
        self.told: list[Event] = []

    def post(self, event: Event) -> None:
        if self.rank == 0:
            self._send(event)

    def tell(self, event: Event) -> None:
        """Posts an event that must not be lost."""
        self.told.append(event)
        self.post(event)

    def notice(self, text: str | None) -> None:
        """Posts a notice for the user at the terminal, if there is one."""
        if text:
            self.post(Notice(text=text))

    def notice_of_any(self, text: str) -> None:
        """Posts a notice that is not rank 0's alone."""
        self._send(Notice(text=text))

    def _send(self, event: Event) -> None:
        if self.mailbox is not None:
            self.mailbox.post.remote(event)
