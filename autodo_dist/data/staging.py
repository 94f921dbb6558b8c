"""Shards on their way to this node's disk: all that fit before the first step, or in the background of training.

The ranks of a node share the shards by turn, so that each is fetched once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autodo_dist.data.cache import Full, ShardCache, Source

log = logging.getLogger(__name__)

ROUND_S = 10.0  # between two lines of progress


@dataclass(frozen=True)
class Turn:
    """Which of the ranks of this node this is: shard i is fetched by the one with i % of == mine."""

    mine: int = 0
    of: int = 1


@dataclass(frozen=True)
class Share:
    """What a rank has staged and has still to stage, bytes."""

    done: int
    left: int


def stage(cache: ShardCache, source: Source, turn: Turn, gather: Callable[[Share], list[Share]]) -> None:
    """Copy to this node all shards that fit; every rank must call this, and all return when the last is done.

    `gather` gives every rank's value on every rank. They meet every few seconds: nobody waits in one collective for as
    long as a data set takes, and rank 0 can say how far all nodes are. A disk that is or becomes full ends the copying
    with a warning. AutodoError where the source cannot be read or its bytes are wrong.
    """
    todo = deque(number for number in cache.wanted() if number % turn.of == turn.mine)
    sizes = [shard.size for shard in cache.shards]
    begin, done = time.monotonic(), 0
    while True:
        round_end = time.monotonic() + ROUND_S
        try:
            while todo and time.monotonic() < round_end:
                cache.fetch(todo[0], source, turn.of)
                done += sizes[todo.popleft()]
        except Full as full:
            log.warning("%s", full)
            todo.clear()
        shares = gather(Share(done, sum(sizes[number] for number in todo)))
        if not any(share.left for share in shares):
            break
        log.info("%s", _progress(shares, time.monotonic() - begin))
    _report(cache, source)


def _progress(shares: list[Share], seconds: float) -> str:
    """Bytes of all ranks, their rate, and the time that the slowest needs at its own."""
    done, left = sum(share.done for share in shares), sum(share.left for share in shares)
    line = f"staging: {done / 1e9:.1f} of {(done + left) / 1e9:.1f} GB, {done / 1e6 / seconds:.0f} MB/s"
    if all(share.done for share in shares if share.left):
        line += f", {max(share.left * seconds / share.done for share in shares if share.left):.0f} s left"
    return line


def _report(cache: ShardCache, source: Source) -> None:
    """Say what of the data set this node has now; a warning where that is not all."""
    kept = [number for number in range(len(cache.shards)) if cache.has(number)]
    if len(kept) == len(cache.shards):
        log.info("%s are in %s", _amount(cache, kept), cache.folder)
        return
    limit = "" if cache.limit is None else f", at most {cache.limit / 1e9:g} GB (data.cache_gb)"
    log.warning("%s are in %s%s; the rest is read from %s", _amount(cache, kept), cache.folder, limit, source)


def _amount(cache: ShardCache, numbers: Sequence[int]) -> str:
    part, all_ = sum(cache.shards[number].size for number in numbers), sum(shard.size for shard in cache.shards)
    return f"{len(numbers)} of {len(cache.shards)} shards ({part / 1e9:.2f} of {all_ / 1e9:.2f} GB)"


class Fetcher:
    """A thread that fetches this rank's share of the shards while training reads the others from the source.

    What goes wrong there is raised by `check`, but for a full disk: that is a warning, and the rest stays unfetched.
    """

    def __init__(self, cache: ShardCache, source: Source, turn: Turn) -> None:
        self._cache, self._source, self._turn = cache, source, turn
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="shard fetcher", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong."""
        if self._error is not None:
            raise self._error

    def close(self, wait_s: float = 10.0) -> None:
        """Stop; what is half fetched is removed."""
        self._stop.set()
        self._thread.join(wait_s)

    def _run(self) -> None:
        try:
            wanted = self._cache.wanted()
            if not wanted:
                return
            where = self._cache.folder
            log.info("%s go into %s while training reads %s", _amount(self._cache, wanted), where, self._source)
            for number in wanted:
                if number % self._turn.of == self._turn.mine:
                    self._cache.fetch(number, self._source, self._turn.of, lambda: not self._stop.is_set())
                if self._stop.is_set():
                    return
            log.info("this rank's part of them is in %s", where)
        except Full as full:
            log.warning("%s; what is not there by now is read from %s", full, self._source)
        except BaseException as error:  # nobody waits for this thread: a reader raises it
            self._error = error
