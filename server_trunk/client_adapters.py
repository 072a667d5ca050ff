"""Training where each client has an adapter of its own on the shared, frozen trunk.

The objective of client ``i`` is its own mean loss ``L_i``: its gradients are divided by its own counted targets and clipped by
themselves, and its own AdamW steps with its own learning rate, whose schedule runs over the steps that this adapter has made. So
what a client gets is what it would get from a server of its own, whoever else is there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

from server_trunk.adapter_book import AdapterBook, AdapterSettings
from server_trunk.training import StepReport
from splitfl.adapters.grouped import ClientLoras
from splitfl.adapters.trainables import copy_into
from splitfl.config import RunConfig
from splitfl.optimizer import build_optimizer, learning_rate_at

__all__ = ["ClientAdapter", "ClientTraining"]


@dataclass(slots=True)
class ClientAdapter:
    """One client's adapter and what trains it. ``made``: optimizer steps. ``step``: the run's newest step that it was part of, -1
    before the first.
    """

    asked: AdapterSettings  # when it was made
    parameters: dict[str, Parameter]  # by full name
    optimizer: torch.optim.AdamW
    made: int = 0
    step: int = -1

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


class ClientTraining:
    """Each client trains its own adapter. An adapter stays when its client leaves, and waits for it.

    ``elsewhere``: by client, the step of a checkpoint that holds its adapter, where it is not this process's to keep.
    """

    #: Whether every adapter of the run is held here, and not only those of clients who have come.
    holds_all = True

    def __init__(self, model: Any, config: RunConfig, book: AdapterBook) -> None:
        self.loras = ClientLoras(model, config.lora, seed=config.seed)
        self.loras.try_out(model)
        self.adapters: dict[str, ClientAdapter] = {}
        self.elsewhere: dict[str, int] = {}
        self._settings, self._book = config.optimizer, book
        self._moved = False

    def joined(self, client: str) -> None:
        asked, present = self._book.of(client), self.adapters.get(client)
        if present is not None and (present.step >= 0 or (present.asked.rank, present.asked.alpha) == (asked.rank, asked.alpha)):
            return
        parameters = self.loras.add(client, rank=asked.rank, alpha=asked.alpha)
        settings = dataclasses.replace(self._settings, weight_decay=asked.weight_decay)
        self.adapters[client] = ClientAdapter(asked, parameters, build_optimizer(parameters.values(), settings))

    def parameters_of(self, owners: Sequence[str]) -> Sequence[Parameter]:
        return [parameter for owner in owners for parameter in self.adapters[owner].parameters.values()]

    def early(self, *, in_place: bool) -> None:
        return None

    def close(self, step: int, targets: Mapping[str, int]) -> StepReport:
        """Step the adapter of each client that contributed; the report has one of its own for each client in ``targets``."""
        self._moved = False
        present = {client: self.adapters[client] for client in targets if client in self.adapters}
        gradients = {
            client: [parameter.grad for parameter in adapter.parameters.values() if parameter.grad is not None]
            for client, adapter in present.items()
            if targets[client] > 0
        }
        gradients = {client: found for client, found in gradients.items() if found}
        # All norms come back from the device together.
        norms = [torch.nn.utils.get_total_norm(found) for found in gradients.values()]
        summed = dict(zip(gradients, torch.stack(norms).tolist() if norms else [], strict=True))
        reports: dict[str, StepReport] = {}
        self._moved = True
        for client, adapter in present.items():
            asked = self._book.of(client)
            rate = learning_rate_at(adapter.made, dataclasses.replace(self._settings, learning_rate=asked.learning_rate))
            if client not in gradients:
                reports[client] = StepReport(rate, None, skipped=True)
                continue
            norm = summed[client] / targets[client]
            finite = math.isfinite(norm)
            adapter.step = step
            self._book.trained(client)
            if finite:
                clip = min(1.0, self._settings.clip / (norm + 1e-6)) if self._settings.clip else 1.0
                torch._foreach_mul_(gradients[client], clip / targets[client])
                for group in adapter.optimizer.param_groups:
                    group["lr"], group["weight_decay"] = rate, asked.weight_decay
                adapter.optimizer.step()
                adapter.made += 1
            reports[client] = StepReport(rate, norm if finite else None, skipped=not finite)
        for adapter in self.adapters.values():
            adapter.clear()
        rate = learning_rate_at(step, self._settings)
        return StepReport(rate, None, all(report.skipped for report in reports.values()), reports)

    def moved(self) -> bool:
        return self._moved

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Nothing: each adapter is kept by itself, see :meth:`state_of`."""
        return {}, {}

    def load(self, tensors: Mapping[str, torch.Tensor], extra: Mapping[str, Any]) -> None:
        """Nothing: each adapter is loaded by itself, see :meth:`load_client`."""

    def begin_anew(self, clients: Iterable[str]) -> None:
        """The adapters of these clients are as they were before their first step."""
        for client in clients:
            del self.adapters[client]
            self.joined(client)

    # --- one client -------------------------------------------------------------------------------------------------------------

    def state_of(self, client: str) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
        """One adapter's weights by their full names; further state by file name; plain values that :meth:`load_client` needs."""
        adapter = self.adapters[client]
        tensors = {name: parameter.detach() for name, parameter in adapter.parameters.items()}
        plain = {"client": client, "adapter": self._book.plain(client), "made": adapter.made}
        return tensors, {"optimizer": adapter.optimizer.state_dict()}, plain

    def recall(self, client: str, plain: Mapping[str, Any]) -> None:
        """What the adapter of a client is like, of the values that :meth:`state_of` gave."""
        self._book.restore(client, plain["adapter"])

    def load_client(
        self, client: str, tensors: Mapping[str, torch.Tensor], extra: Mapping[str, Any], plain: Mapping[str, Any], step: int
    ) -> None:
        """Take back what :meth:`state_of` gave at ``step``, its settings having been taken back by :meth:`recall`. Raises
        CheckpointError where it is another model's.
        """
        ClientTraining.joined(self, client)
        adapter = self.adapters[client]
        copy_into(adapter.parameters, tensors)
        adapter.optimizer.load_state_dict(extra["optimizer"])
        adapter.made, adapter.step = plain["made"], step
