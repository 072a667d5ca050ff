"""One replica among others: its steps, its training, its word with rank 0; on rank 0, also the word with all.

A replica starts with :meth:`Replica.meet`, ends with :meth:`Replica.halt`. Between them words come in on threads of the control
group, and go through one lock at rank 0, so that all replicas hear its decisions in one order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import Any

from server_trunk.adapter_book import AdapterBook
from server_trunk.engine import Engine
from server_trunk.keeping import RunKeeper
from server_trunk.replicas.assignment import Assignment
from server_trunk.replicas.attendance import Attendance
from server_trunk.replicas.client_adapters import SpreadTraining
from server_trunk.replicas.control import Control
from server_trunk.replicas.coordinator import Coordinator
from server_trunk.replicas.group import Group
from server_trunk.replicas.meetings import Meetings
from server_trunk.replicas.run import ReplicaRun
from server_trunk.replicas.steps import Heard, ReplicaSteps
from server_trunk.replicas.training import AveragedTraining, ReducedTraining, replica_training
from server_trunk.replicas.words import Move, Presence, State, Stays, StopAsked, Word
from server_trunk.sharding.engines import LeadingEngine
from server_trunk.sharding.group import ShardGroup
from splitfl.checkpoint import checkpoint_steps
from splitfl.config import RunConfig
from splitfl.errors import SplitflError, first_line
from splitfl.protocol.messages import Redirect

__all__ = ["Replica"]

#: Seconds between two reports of who brings how much.
_REPORT_EVERY = 1.0
#: Seconds that the other replicas are waited for when all end.
_GOODBYE = 20.0


class Replica:
    """``stopped`` is set once no step closes any more, on any replica; ``failure`` once another replica is gone."""

    def __init__(self, config: RunConfig, group: Group, shards: ShardGroup | None = None) -> None:
        """``shards``: the ranks this replica's trunk lies on, of which this one leads."""
        self.group, self._config, self._shards = group, config, shards
        self.meetings = Meetings.of(config)
        self.stopped = threading.Event()
        self.back = False  # whether the server means to start again, as whichever replica was asked to end has heard it
        self.failure: SplitflError | None = None
        self._control = Control(group, self._take, self._lost)
        self._lock = threading.Lock()
        self._assignment = Assignment(group.size)
        self._attendance = Attendance(group.size)
        self._here: tuple[str, ...] = ()
        self._awaited: tuple[str, ...] = ()
        self._trained = False
        self._company: threading.Timer | None = None  # at rank 0: ends the wait for all clients of a run that was taken up again
        self._first = 0
        self._reported = 0.0
        self._addresses: list[tuple[int, str, int]] = []
        self._halting = False
        self._wake: Callable[[], None] = lambda: None
        self._loads: Callable[[], dict[str, float]] = dict

    # --- what a server is made of -----------------------------------------------------------------------------------------------

    def training_of(self, model: Any, book: AdapterBook) -> ReducedTraining | AveragedTraining | SpreadTraining:
        if self._config.adapters == "per-client":
            return SpreadTraining(model, self._config, book, self.group)
        return replica_training(self._config, model, self.group, self._shards)

    def steps_of(self, engine: Engine, *, first: int) -> ReplicaSteps:
        """The steps of this replica, over ``engine``, whose training is that of :meth:`training_of`."""
        training = engine.training

        def on_all_ranks(what: str, *values: Any) -> None:
            if isinstance(engine, LeadingEngine):
                engine.train(what, *values)
            else:
                getattr(training, what)(*values)

        def say(word: State | Stays | Move) -> None:
            self._tell_first(word)
            if time.monotonic() - self._reported >= _REPORT_EVERY:
                self._report()

        def on_stop(back: bool) -> None:
            self.back = back
            if isinstance(training, AveragedTraining):
                # Amid a round each replica's weights are its own: what they have learned since is kept too.
                on_all_ranks("average")
                engine.closed = self._run.broke_off(engine.closed, self._steps.counted)
            self._run.keep_adapters()
            self.stopped.set()

        config, self._first = self._config, first
        self._coordinator = Coordinator(
            self.group.size,
            clients=config.clients,
            meetings=self.meetings,
            first=first,
            kept=lambda: checkpoint_steps(config.out_dir),
            choose=self._choose,
        )
        self._steps = ReplicaSteps(
            say,
            meetings=self.meetings,
            rank=self.group.rank,
            first=first,
            on_loss=config.on_loss,
            deadline=config.step_deadline,
            on_whole=partial(on_all_ranks, "begin") if isinstance(training, ReducedTraining) else lambda targets: None,
            on_stop=on_stop,
            foresees=isinstance(training, ReducedTraining) and self._shards is None and training.leaves_early,
        )
        return self._steps

    def run_of(self, keeper: RunKeeper) -> ReplicaRun:
        """What the trunk's loop keeps the run with."""
        self._run = ReplicaRun(keeper, self.group, self.meetings)
        return self._run

    def meet(
        self, serve: Callable[[], tuple[str, int]], *, wake: Callable[[], None], loads: Callable[[], dict[str, float]]
    ) -> None:
        """Let all replicas open their endpoints, rank 0 last: so it knows from its first client on where the others are. From
        then on words come.

        ``serve``: opens this replica's, and says at which host and port clients reach its control endpoint. ``wake``: wakes the
        trunk's thread, for each word. ``loads``: what each present client brings to a step, in tokens.
        """
        self._wake, self._loads = wake, loads
        if self.group.is_first:
            self._addresses = self.group.gather((self.group.place.machine, "", 0))
            serve()
        else:
            self.group.gather((self.group.place.machine, *serve()))
        self._control.start()

    # --- clients ----------------------------------------------------------------------------------------------------------------

    def redirect(self, client: str) -> Redirect | None:
        """Where a client that has come here is to go; None: it stays. From the I/O thread."""
        if not self.group.is_first:
            return None
        with self._lock:
            rank = self._assignment.place(client, time.monotonic())
        if rank == self.group.rank:
            return None
        machine, host, port = self._addresses[rank]
        return Redirect("" if machine == self.group.place.machine else host, port)

    def _choose(self, step: int, movable: Sequence[Sequence[str]]) -> Move | None:
        """At rank 0: who goes to another replica after ``step``. An adapter of its own moves along where it was just kept."""
        config = self._config
        if config.adapters == "per-client" and not self._run.is_due(step):
            return None
        # Until a round is over, a member that loses its link has to find the replica that waits for its ends.
        ends_round = bool(config.round_steps) and (step + 1) % config.round_steps == 0
        return self._assignment.rebalance(step, movable, time.monotonic(), at_once=not ends_round)

    def present(self, here: Set[str], awaited: Set[str], trained: bool) -> None:
        """Who is here now, and whose return is waited for; from the trunk's thread."""
        self._here, self._awaited, self._trained = tuple(sorted(here)), tuple(sorted(awaited)), trained
        self._report()

    def _report(self) -> None:
        self._reported = time.monotonic()
        self._tell_first(Presence(self._loads(), self._here, self._awaited, self._trained))

    # --- words ------------------------------------------------------------------------------------------------------------------

    def _tell_first(self, word: Word) -> None:
        if self.group.is_first:
            self._take(0, word)
        else:
            self._control.tell(0, word)

    def _tell(self, rank: int, word: Word) -> None:
        if rank == self.group.rank:
            self._hear(word)
        else:
            self._control.tell(rank, word)

    def _hear(self, word: Word) -> None:
        """A word from rank 0."""
        if isinstance(word, Heard):
            self._steps.hear(word)
            self._wake()

    def _take(self, rank: int, word: Word) -> None:
        if not self.group.is_first:
            self._hear(word)
            return
        with self._lock:
            for told, answer in self._answers(rank, word):
                self._tell(told, answer)

    def _answers(self, rank: int, word: Word) -> Sequence[tuple[int, Word]]:
        """At rank 0: what follows from a word."""
        if isinstance(word, State):
            self._await_company(word)
            return self._coordinator.hear(rank, word)
        if isinstance(word, Presence):
            self._assignment.hear(rank, word.tokens)
            self._attendance.hear(rank, word)
            return self._coordinator.stop() if self._config.until_done and self._attendance.is_over else []
        if isinstance(word, Stays):
            return [(word.rank, word)]
        if isinstance(word, Move):
            return self._assignment.hear_of(rank, word, time.monotonic())
        if not isinstance(word, StopAsked):
            return []
        if word.patience:
            threading.Timer(word.patience, self._take, (0, StopAsked())).start()
            return self._coordinator.drain()
        return self._coordinator.stop(now=True)

    def _await_company(self, state: State) -> None:
        """As one server does (:class:`server_trunk.steps.Steps`): a run that was taken up again waits no longer than a step."""
        patience = self._config.step_deadline
        if self._company is None and self._first and state.enrolled and patience:
            self._company = threading.Timer(patience, self._begin)
            self._company.daemon = True
            self._company.start()

    def _begin(self) -> None:
        with self._lock:
            for told, word in self._coordinator.begin():
                self._tell(told, word)

    def _lost(self, rank: int, error: Exception) -> None:
        if not self._halting and self.failure is None:
            self.failure = SplitflError(f"replica {rank} is gone ({first_line(error)}), so this one ends too")

    # --- the end ----------------------------------------------------------------------------------------------------------------

    def await_stop(self, patience: float, *, has_failed: Callable[[], bool], hurries: Callable[[], bool]) -> bool:
        """Let the open step come to its end, for at most so many seconds, and wait until all replicas stand still.

        ``has_failed``: whether the trunk's thread has; returns False where it has, or a replica is gone. ``hurries``: whether the
        open step is waited for no longer.
        """
        self._tell_first(StopAsked(patience))
        while self.failure is None and not has_failed():
            if self.stopped.wait(0.05):
                return self.failure is None
            if patience and hurries():
                patience = 0.0
                self._tell_first(StopAsked())
        return False

    def halt(self) -> None:
        """Part from the others, once :attr:`stopped`."""
        self._halting = True
        self._control.close(_GOODBYE)
