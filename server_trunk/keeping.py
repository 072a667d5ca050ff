"""What a run keeps and how it goes on: checkpoints of closed steps, and where a server that starts again finds itself.

A run's directory holds ``checkpoints/step-N`` and, where each client has its own adapter, ``clients/NAME/checkpoints/step-M``
with that adapter and its optimizer, ``M`` being the newest step that the client was part of: the number that its ends bear too.
``step-N`` is written last and names each client's ``M``, so it stands for the whole or is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from server_trunk.client_adapters import ClientTraining
from server_trunk.engine import Engine
from server_trunk.ledger import Ledger
from server_trunk.roundkeeper import RoundKeeper
from server_trunk.run_ledger import RunLedger
from server_trunk.sharding.engines import LeadingEngine
from server_trunk.sharding.training import whole_optimizer
from splitfl.adapters.results import describe_part
from splitfl.checkpoint import (
    checkpoint_directory,
    checkpoint_steps,
    client_directory,
    in_shards,
    load_checkpoint,
    load_meta,
    prune_checkpoints,
    prune_client_checkpoints,
    put_aside,
    save_checkpoint,
)
from splitfl.config import LoraSettings, RunConfig
from splitfl.errors import CheckpointError, NotReadable, RemoteProtocolError
from splitfl.packed_state import unpack_state
from splitfl.parts.cut import Cut
from splitfl.parts.identity import ModelIdentity, compare
from splitfl.runlog import RunLog

__all__ = ["RunKeeper"]

Checkpoint = tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, bytes]]


class RunKeeper:
    """Writes and reads the checkpoints of one run. Called while the trunk stands still: from its thread, before or after it."""

    def __init__(
        self,
        config: RunConfig,
        model: Any,
        identity: ModelIdentity,
        engine: Engine,
        log: RunLog,
        rounds: RoundKeeper | None = None,
        *,
        leads: bool = True,
    ) -> None:
        """``rounds``: where the run averages the clients' ends; a checkpoint has the newest average. ``leads``: whether this
        process writes the run's checkpoints, and puts damaged ones aside.
        """
        self._config, self._model, self._identity, self._engine, self._log = config, model, identity, engine, log
        self._rounds, self._leads = rounds, leads
        self.training = engine.training
        self._is_shared: bool | None = None  # whether all ranks of the trunk can write the run's checkpoints
        self.saved = -1  # the step of the newest checkpoint
        self.ledger = RunLedger()

    # --- what the trunk's loop tells and asks (see :class:`~server_trunk.stepkeeper.Run`) ---------------------------------------

    def made(self, ledger: Ledger) -> bool:
        """A step was made; returns whether its checkpoint is written."""
        self.ledger.enter(ledger)
        if not self.is_due(ledger.step):
            return False
        self.save(ledger.step)
        return True

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint of ``step`` is to be written: one is due since the newest, or it is the run's last step."""
        every, last = self._config.kept_every, self._config.optimizer.steps
        return bool(every and (step + 1) // every > (self.saved + 1) // every) or step + 1 == last

    def kept(self) -> Sequence[int]:
        """The steps of all checkpoints, ascending."""
        return checkpoint_steps(self._config.out_dir)

    def go_back(self, step: int) -> None:
        """Load the checkpoint of ``step``, after which all clients can go on; newer ones are renamed, so that the run will not
        go on from them. Raises CheckpointError where it is damaged; then it is renamed too.
        """
        try:
            main, clients = self._read(step)
        except NotReadable:
            raise
        except CheckpointError as error:
            if self._leads:
                self._put_damaged_aside(step, error)
            raise
        self._load(main, clients)
        if isinstance(self.training, ClientTraining):
            self.training.begin_anew([client for client in self.training.adapters if client not in clients])
        for newer in [each for each in self.kept() if each > step]:
            put_aside(checkpoint_directory(self._config.out_dir, newer), "undone")
        self.saved = self._engine.closed = step
        self._log.write("went-back", step=step)

    # --- saving -----------------------------------------------------------------------------------------------------------------

    def save(self, step: int) -> Path:
        """Write the checkpoint of a closed step, atomically; older ones beyond ``checkpoint_keep`` go."""
        config, training = self._config, self.training
        directory = checkpoint_directory(config.out_dir, step)
        tensors, extra, write = self._contents(directory.parent)
        extra |= {"ledger": self.ledger.state()}
        if self._rounds is not None:
            extra |= self._rounds.state()
        meta = self._describe(step, config.lora)
        if isinstance(training, ClientTraining):
            meta["clients"] = self.save_clients(training) | training.elsewhere
        save_checkpoint(directory, tensors, meta, extra, write=write)
        prune_checkpoints(config.out_dir, config.checkpoint_keep)
        prune_client_checkpoints(config.out_dir)
        self.saved = step
        self._log.write("checkpoint", step=step, directory=str(directory))
        return directory

    def _contents(self, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], Callable[[Path], dict[str, str]] | None]:
        """As :func:`save_checkpoint` takes them: all that is trained; or, of several ranks, what writes that in shards.

        A LoRA is small, and gathered.
        """
        engine = self._engine
        if isinstance(engine, LeadingEngine) and self._config.trainables == "full":
            if self._is_shared is None:
                self._is_shared = engine.shares(folder)
            if self._is_shared:
                return {}, engine.outline(), engine.write
        return *engine.state(), None

    def save_clients(self, training: ClientTraining) -> dict[str, int]:
        """Write each adapter that has moved since it was written last; returns the step of each client's checkpoint. Those that
        are elsewhere are not this process's to write.
        """
        written: dict[str, int] = {}
        for client, adapter in training.adapters.items():
            if adapter.step < 0 or client in training.elsewhere:
                continue  # it is as it would start anew
            written[client] = adapter.step
            directory = checkpoint_directory(client_directory(self._config.out_dir, client), adapter.step)
            if adapter.step > self.saved or not directory.is_dir():
                tensors, extra, plain = training.state_of(client)
                lora = self._config.lora
                own = LoraSettings(plain["adapter"]["rank"], plain["adapter"]["alpha"], lora.dropout, lora.targets)
                meta = self._describe(adapter.step, own) | {"fan_in_fan_out": training.loras.fan_in_fan_out}
                save_checkpoint(directory, tensors, meta | plain, extra)
        return written

    def _describe(self, step: int, lora: LoraSettings) -> dict[str, Any]:
        config = self._config
        cut = Cut.parse(config.cut)
        about = describe_part(
            self._model,
            part="trunk",
            base=config.model,
            identity=self._identity.to_plain(),
            cut=(cut.input_blocks, cut.output_blocks),
            trainables=config.trainables,  # type: ignore[arg-type]
            lora=lora if config.trainables == "lora" else None,
            task="causal-lm",
            step=step,
            run=config.run,
        )
        return about | {"mode": config.mode}

    # --- going on ---------------------------------------------------------------------------------------------------------------

    def resume(self) -> int:
        """Load the newest checkpoint that is whole, with every client's adapter; returns the number of the run's next step.

        A newer one that is damaged is renamed, so that it is in nobody's way.

        Raises:
            CheckpointError: there is none, or it is of another model, cut or kind of training.
            NotReadable: the newest cannot be read, and is not damaged; the run is not to go on from an older one.
        """
        out = self._config.out_dir
        steps = checkpoint_steps(out)
        if not steps:
            raise CheckpointError(f"{out} holds no checkpoint to go on from: leave --resume out to begin a new run")
        for step in reversed(steps):
            directory = checkpoint_directory(out, step)
            try:
                main, clients = self._read(step)
            except CheckpointError as error:
                if not self._leads:
                    raise CheckpointError(
                        f"{error} Replica 0 could read it: give all replicas the run's directory, shared or copied"
                    ) from None
                if isinstance(error, NotReadable):
                    raise
                self._put_damaged_aside(step, error)
                continue
            self._check(directory, main[1])
            self._load(main, clients)
            self.saved = self._engine.closed = step
            self._log.write("resumed", step=step, clients=sorted(clients) or None)
            return step + 1
        raise CheckpointError(f"every checkpoint of {out} is damaged: begin a new run under another name with --run or --out")

    def _put_damaged_aside(self, step: int, error: CheckpointError) -> None:
        aside = put_aside(checkpoint_directory(self._config.out_dir, step), "damaged")
        self._log.write("checkpoint-damaged", step=step, error=str(error), kept_as=str(aside))

    def _read(self, step: int) -> tuple[Checkpoint, dict[str, Checkpoint]]:
        out = self._config.out_dir
        main = load_checkpoint(checkpoint_directory(out, step), shards=not isinstance(self._engine, LeadingEngine))
        named: Mapping[str, int] = main[1].get("clients") or {}
        return main, {client: self._read_client(client, own) for client, own in named.items()}

    def _read_client(self, client: str, step: int) -> Checkpoint:
        """Without weights and state where they are not wanted here now; then they are read to prove that they are whole."""
        directory = checkpoint_directory(client_directory(self._config.out_dir, client), step)
        if self._holds(client):
            return load_checkpoint(directory)
        return {}, load_checkpoint(directory)[1] if self._leads else load_meta(directory), {}

    def _holds(self, client: str) -> bool:
        """Whether this process is to have the client's adapter, now that the run goes on."""
        training = self.training
        return isinstance(training, ClientTraining) and (training.holds_all or client in training.adapters)

    def _check(self, directory: Path, meta: Mapping[str, Any]) -> None:
        """Raises CheckpointError where the checkpoint is not of this config's training."""
        config = self._config
        try:
            difference = compare(ModelIdentity.from_plain(meta["identity"]), self._identity)
        except (KeyError, RemoteProtocolError) as error:
            raise CheckpointError(
                f"{directory} does not say which model it is of: begin a new run with --run or --out"
            ) from error
        if difference:
            raise CheckpointError(f"{directory} is of another model, {difference}: resume with the model of the run")
        mine = self._describe(meta["step"], config.lora)
        for name in ("cut", "trainables", "lora"):
            if meta[name] != mine[name]:
                raise CheckpointError(
                    f"{directory} was written with {name} = {meta[name]}, not {mine[name]}: resume with the same"
                )
        if ("clients" in meta) != (config.adapters == "per-client"):
            kind = "per-client" if "clients" in meta else "shared"
            raise CheckpointError(f"{directory} was written with adapters = {kind}: resume with the same")

    def _load(self, main: Checkpoint, clients: Mapping[str, Checkpoint]) -> None:
        training = self.training
        tensors, meta, extra = main
        state = {name: unpack_state(content) for name, content in extra.items()}
        self.ledger = RunLedger.from_state(state["ledger"]) if "ledger" in state else RunLedger()
        directory = checkpoint_directory(self._config.out_dir, meta["step"])
        if not in_shards(directory):
            training.load(tensors, state)
        elif isinstance(self._engine, LeadingEngine):
            self._engine.read(directory, state["optimizer"])
        else:
            training.load(tensors, {"optimizer": whole_optimizer(directory, state["optimizer"])})
        torch.set_rng_state(state["generator"])
        if self._rounds is not None:
            self._rounds.load(state)
        for client, (weights, about, files) in clients.items():
            assert isinstance(training, ClientTraining), "checked before"
            training.recall(client, about)
            if self._holds(client):
                own = {name: unpack_state(content) for name, content in files.items()}
                training.load_client(client, weights, own, about, about["step"])
        if isinstance(training, ClientTraining) and not training.holds_all:
            training.elsewhere = {client: about["step"] for client, (_, about, _) in clients.items()}
