"""The trunk server as one object: loads the trunk, opens the endpoints, runs the loop, keeps the run.

config = build_config({"model": "path", "clients": 3, ...})
server = TrunkServer(config)
server.start()
print(server.join)
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import torch

from server_trunk.adapter_book import AdapterBook
from server_trunk.async_steps import steps_of
from server_trunk.averaging import Averager
from server_trunk.beforehand import check_before, check_new, server_identity
from server_trunk.building import Trunk, load_run_trunk
from server_trunk.endpoints import Endpoints
from server_trunk.ends_book import EndsBook
from server_trunk.gateway import Gateway
from server_trunk.keeping import RunKeeper
from server_trunk.kvcache import CacheBook
from server_trunk.live import Live
from server_trunk.meter import Meter
from server_trunk.replicas.group import Group, in_turn
from server_trunk.replicas.replica import Replica
from server_trunk.roundkeeper import RoundKeeper
from server_trunk.rounds import Rounds
from server_trunk.run_lock import RunLock
from server_trunk.scheduler import Scheduler
from server_trunk.sharding.engines import LeadingEngine
from server_trunk.sharding.group import ShardGroup
from server_trunk.trunkloop import TrunkLoop
from server_trunk.watch import Watch
from splitfl.adapters.layout import part_bytes_for
from splitfl.checkpoint import checkpoint_steps, mend_checkpoints
from splitfl.config import RunConfig, to_toml
from splitfl.errors import ConfigError, GroupLost, NotWritten, SplitflError
from splitfl.parts.identity import model_identity
from splitfl.parts.trunk import find_trunk
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import AuthorizedClients
from splitfl.runlog import RunLog
from splitfl.tensors import byte_view

__all__ = ["TrunkServer", "load_run_trunk"]

#: Seconds in which the trunk's thread finds for itself that another process is gone, if it waits for that one.
_SAYS_WHY = 1.0


class TrunkServer:
    """One run's server. ``start`` returns when clients can join; ``wait`` when the run has ended."""

    def __init__(
        self,
        config: RunConfig,
        *,
        resume: bool = False,
        resume_if_any: bool = False,
        echo: Any = None,
        transport: Any = None,
        group: Group | None = None,
        shards: ShardGroup | None = None,
        watch: Watch | None = None,
        **channel_options: Any,
    ) -> None:
        """Load everything, open nothing.

        ``resume``: go on from the newest checkpoint of the run's directory; ``resume_if_any``: the same, or begin where it holds
        none. Of several replicas it is rank 0's that counts. ``echo``: a text stream for readable log lines.
        ``group``: the other replicas of this server, each of which makes one of these; rank 0's keeps the run.
        ``shards``: the ranks that hold the trunk, of which this one leads; the others run ``building.follow_leader``.
        ``watch``: knows whether the processes of all of these live.
        ``transport``: in place of sockets. ``channel_options``: further arguments of :class:`ServerChannel`, for tests and
        benchmarks.

        Raises:
            ModelError, ConfigError, KeyFileError, CheckpointError: each one sentence with the mend.
        """
        self._group, self._watch = group, watch
        if group is not None:
            group.agree(config.terms() | {"sync": config.sync})
            config = group.place.settle(config)
        self.config = config
        out = config.out_dir
        listed, self._device = check_before(config, device=None if shards is None else shards.device)
        self._held = contextlib.ExitStack()  # until another server may have the run
        with _writing_to(out):
            out.mkdir(parents=True, exist_ok=True)
            if self._is_first:
                self._held.callback(RunLock(out).release)
        try:
            in_turn(group, lambda: mend_checkpoints(out))
            resume = self._goes_on(resume, resume_if_any)
            self.identity = in_turn(group, lambda: server_identity(config, self._is_first))
            self.authorized = AuthorizedClients(listed)
            self.endpoints = Endpoints(config, self.identity, self.authorized, transport, **channel_options)
            self._set_up(shards, resume, echo)
        except BaseException:
            self._held.close()
            raise

    def _goes_on(self, resume: bool, if_any: bool) -> bool:
        """Whether from a checkpoint. Raises ConfigError where a new run would push an earlier one out."""
        out = self.config.out_dir
        resume = resume or (if_any and self._is_first and bool(checkpoint_steps(out)))
        if self._group is not None:
            resume = self._group.gather(resume)[0]
        if not resume and not if_any and self._is_first:
            check_new(out)
        return resume

    def _set_up(self, shards: ShardGroup | None, resume: bool, echo: Any) -> None:
        """Load the trunk, and what stands around it."""
        config, group, out = self.config, self._group, self.config.out_dir
        if self._is_first and not resume:
            self._write_config()
        if config.threads:
            torch.set_num_threads(config.threads)
        self._log = RunLog(out / ("log.jsonl" if group is None else group.place.log_name), echo=echo)
        self._held.callback(self._log.close)
        self._model_identity = model_identity(config.model, revision=config.revision)
        self._book = AdapterBook(config)
        self._replica = Replica(config, group, shards) if group is not None else None
        trunk = Trunk(
            config,
            self._device,
            self._book,
            shards,
            training_of=functools.partial(self._replica.training_of, book=self._book) if self._replica is not None else None,
            log=self._log.write,
        )
        self._model, self._engine = trunk.model, trunk.engine
        self._packing_obstacle = trunk.packing_obstacle
        self._caches = CacheBook(*(config.caches if trunk.cache_obstacle is None else (0, 0)))
        if isinstance(self._engine, LeadingEngine):
            self._caches.make = self._engine.new_sequence
        self.meter = Meter(config.batch_tokens, packed=self._packing_obstacle is None)
        self._live = Live(self.meter, self._log, every=config.status_every, address=config.metrics)
        self._ends = EndsBook(averaged=config.round_steps > 0, part_bytes=part_bytes_for(config.window))
        self._rounds = self._make_rounds() if config.round_steps else None
        self._keeper = RunKeeper(
            config, self._model, self._model_identity, self._engine, self._log, self._rounds, leads=self._is_first
        )
        self._first = 0
        if resume:
            self._first = in_turn(group, self._keeper.resume)
            if group is not None:
                group.agree({"newest checkpoint": self._first - 1})
            if self._is_first:
                self._write_config()  # what cannot go on leaves the run's own as it is
        self._done = threading.Event()
        self._hurried = False

    @property
    def _is_first(self) -> bool:
        """Whether this process keeps the run: the only one, or rank 0 of the replicas."""
        return self._group is None or self._group.is_first

    def _write_config(self) -> None:
        out = self.config.out_dir
        with _writing_to(out):
            (out / "config.toml").write_text(to_toml(self.config), encoding="utf-8")

    def _make_rounds(self) -> RoundKeeper:
        averager = Averager(
            self.config.out_dir, credit=self.endpoints.credit, tell=lambda: self._loop.wake(), replicas=self._group
        )
        config = self.config
        rounds = Rounds(
            steps=config.round_steps, deadline=config.step_deadline, on_loss=config.on_loss, alone=self._group is None
        )
        return RoundKeeper(rounds, averager, self._ends, self.endpoints, self._log)

    def start(self) -> None:
        """Open the endpoints and start both threads; :attr:`join` is what clients need. A run that cannot start is let go.

        Raises:
            ConfigError: an address cannot be bound.
        """
        try:
            self._start()
        except BaseException:
            self._engine.close()
            self._let_go("the server has failed", back=True)
            self._held.close()
            raise

    def _start(self) -> None:
        config = self.config
        scheduler = Scheduler(
            config.batch_tokens,
            policy="one-client" if config.mode == "async" else config.policy,
            graph_tokens={"keep": None, "recompute": 0}.get(config.graphs, config.graph_tokens or None),
            batch_wait=config.batch_wait,
            packed=self._packing_obstacle is None,
        )
        self._loop = TrunkLoop(
            self._engine,
            self._replica.steps_of(self._engine, first=self._first) if self._replica else steps_of(config, first=self._first),
            scheduler,
            self.endpoints,
            self._log,
            client_tokens=config.client_tokens,
            payload_of=byte_view,
            meter=self.meter,
            run=self._replica.run_of(self._keeper) if self._replica else self._keeper,
            rounds=self._rounds,
            caches=self._caches,
            on_presence=self._on_presence,
        )
        hidden = self._model.config.get_text_config().hidden_size
        gateway = Gateway(
            config,
            self._model_identity,
            hidden,
            self._loop.inbox,
            self._log,
            book=self._book,
            ends=self._ends,
            meter=self.meter,
            pin=self._device.type == "cuda",
            longest=find_trunk(self._model).layout.longest,
            cache_tokens=self._caches.client_tokens,
            stands=lambda: self._loop.step,
            elsewhere=self._replica.redirect if self._replica else lambda client: None,
        )
        self.meter.watch(
            waiting=lambda: scheduler.waiting_tokens,
            graphs=lambda: scheduler.kept_graph_tokens,
            kept=scheduler.kept_tokens,
            traffic=self.endpoints.traffic,
        )
        self._live.start()
        if self._replica is not None:
            serve = functools.partial(self.endpoints.open, gateway)
            self._replica.meet(serve, wake=self._loop.wake, loads=self.meter.loads)
        else:
            self.endpoints.open(gateway)
        self._loop.start()
        self._log.write("serving", quiet=True, join=str(self.join))

    @property
    def join(self) -> JoinString | None:
        """What clients need to come here; None until :meth:`start`."""
        return self.endpoints.join

    # --- the run's life ---------------------------------------------------------------------------------------------------------

    def _on_presence(self, here: Set[str], awaited: Set[str], trained: bool) -> None:
        if self._replica is not None:
            self._replica.present(here, awaited, trained)
        elif self.config.until_done and trained and not here and not awaited:
            self._done.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end of the run (``until_done``) or the failure of the trunk; True once it has ended.

        Raises:
            NotWritten: a checkpoint cannot be written.
            SplitflError: the trunk's thread or the channel's failed, or another process of the server is gone.
        """
        done = self._done if self._replica is None else self._replica.stopped
        waited = 0.0
        while timeout is None or waited < timeout:
            if done.wait(0.1):
                return True
            gone = self._gone
            if gone is not None:
                raise gone
            waited += 0.1
            if isinstance(self._loop.failure, NotWritten):
                raise self._loop.failure
            if self._loop.failure is not None:
                raise SplitflError(f"the trunk failed: {self._loop.failure}") from self._loop.failure
            # Nobody could come any more: better an end, after which the server is started again.
            if self.endpoints.failure is not None:
                raise SplitflError(f"the channel failed: {self.endpoints.failure}") from self.endpoints.failure
        return False

    @property
    def _gone(self) -> SplitflError | None:
        """Why another process of this server is gone; None where none is."""
        found = self._replica.failure if self._replica is not None else None
        return found or (self._watch.failure if self._watch is not None else None)

    def _has_failed(self) -> bool:
        return self._loop.failure is not None or self._gone is not None

    def hurry(self) -> None:
        """Wait no longer for the end of the open step, in :meth:`stop`. From any thread, and a signal's handler."""
        self._hurried = True

    def _hurries(self) -> bool:
        return self._hurried

    def stop(self, text: str = "the server is stopping", *, back: bool = False, patience: float = 0.0) -> None:
        """Finish the batch under way, write a last checkpoint, tell the clients, close. Raises NotWritten once all is closed.

        ``back``: the server means to start again, so that clients wait for it. ``patience``: seconds that the open step may take
        to its end.
        """
        if not self.endpoints.are_open:
            self._held.close()
            return
        replica, whole = self._replica, True
        if replica is not None:
            whole = not self._has_failed() and replica.await_stop(patience, has_failed=self._has_failed, hurries=self._hurries)
            back = back or replica.back
        elif self._gone is not None or isinstance(self._loop.failure, GroupLost):
            whole = False
        elif patience:
            self._loop.finish_step(patience, self._hurries)
        if whole:  # else the trunk's thread may wait for a process that is gone
            self._loop.stop()
            self._engine.close()
        elif not self._loop.join(_SAYS_WHY) and self._gone is not None:
            self._log.write("failed", error=str(self._gone))
        try:
            # Where the trunk failed amid an optimizer step, the weights are of no step: the last checkpoint stands.
            # Where it stops amid a round, the step that ended it was said to nobody: a checkpoint of it would lack the average.
            closed = self._engine.closed
            if whole and closed is not None and closed > self._keeper.saved and not self._loop.is_amid_round and self._is_first:
                self._keeper.save(closed)
        finally:
            if replica is not None and whole:
                replica.halt()
            if isinstance(self._engine, LeadingEngine) and whole:
                self._engine.stop()
            self._let_go(text if whole else "the server is starting again", back=back or not whole)
            self._log.write("stopped", why=text)
            self._held.close()
        if isinstance(self._loop.failure, NotWritten):
            raise self._loop.failure

    def _let_go(self, text: str, *, back: bool) -> None:
        """Of clients, and of who watches. The trunk's thread has ended, or waits for a process that is gone."""
        if self._rounds is not None:
            self._rounds.close()
        self.endpoints.close(text, back=back)
        self._live.stop()


@contextlib.contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    """A refusal of the system's in one sentence."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write to {out} ({error.strerror}): make room, or choose another directory with --out"
        ) from None
