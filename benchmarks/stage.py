"""What several benchmarks set up alike: a model made on the spot, one server process, its clients' keys, links between them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.link import Link, host_of
from benchmarks.relay import free_port
from benchmarks.trunks import ReplicatedTrunk, serve

__all__ = ["VOCABULARY", "Stage", "batch_of", "build_model", "optimizer_of", "quiet", "train"]

VOCABULARY = 2048
LEARNING_RATE = 1e-4


def quiet() -> None:
    """Idle threads sleep and libraries say nothing, here and in every process started from here."""
    # Spinning threads would take the cores from the other processes.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def build_model(directory: Path, *, hidden: int, blocks: int) -> None:
    """A Llama with random weights as a Hugging Face directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


class Workers:
    """Processes with a pipe each, started afresh (`spawn`), ended by None."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._all: list[tuple[Any, Connection]] = []
        self._of: dict[str, list[int]] = {}

    def start(self, role: str, target: Any, *args: Any) -> Connection:
        near, far = self._context.Pipe()
        process = self._context.Process(target=target, args=(far, *args), daemon=True)
        process.start()
        self._all.append((process, near))
        self._of.setdefault(role, []).append(process.pid)
        return near

    def cpu_seconds(self) -> dict[str, float]:
        """CPU seconds used so far, by role."""
        import psutil

        return {
            role: sum(times.user + times.system for times in (psutil.Process(pid).cpu_times() for pid in pids))
            for role, pids in self._of.items()
        }

    def stop(self) -> None:
        for _, pipe in reversed(self._all):
            with contextlib.suppress(BrokenPipeError):  # it has failed
                pipe.send(None)
        for process, _ in reversed(self._all):
            process.join(20)
            if process.is_alive():
                process.kill()


class Stage:
    """A server process, or its replicas, with ``clients`` keys on its list, each reached over a link of its own where ``links``.

    ``settings`` go into the run config; ``model_dir`` reuses a model, else a Llama of ``hidden`` and ``blocks`` is made.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        clients: int,
        hidden: int,
        blocks: int,
        model_dir: str | None = None,
        links: bool = False,
    ) -> None:
        from splitfl.protocol.keys import write_identity

        self._work = tempfile.TemporaryDirectory()
        work = self._work.name
        self.model_dir = model_dir or f"{work}/model"
        if model_dir is None:
            build_model(Path(self.model_dir), hidden=hidden, blocks=blocks)
        self.keys = [f"{work}/client{index}.key" for index in range(clients)]
        lines = [f"{write_identity(key).public} client{index}" for index, key in enumerate(self.keys)]
        Path(f"{work}/authorized_clients").write_text("\n".join(lines) + "\n")
        own: dict[str, Any] = {
            "model": self.model_dir,
            "out": f"{work}/server",
            "authorized_clients": f"{work}/authorized_clients",
            "checkpoint_every": 0,
            "trainables": "full",
            "optimizer.learning_rate": LEARNING_RATE,
        }
        self._out = Path(work) / "server"
        self.link: Link | None = None
        self._workers = Workers()
        self._replicas: ReplicatedTrunk | None = None
        try:
            if settings.get("mode") == "hierarchical":
                self._replicas = ReplicatedTrunk(own | settings, work)
                self.joins = [self._replicas.join] * clients
            else:
                self._start_server(own | settings, clients, links)
        except BaseException:
            self.close()
            raise

    def _start_server(self, settings: dict[str, Any], clients: int, links: bool) -> None:
        from splitfl.protocol.join import JoinString

        port, data_port = free_port(), free_port()
        own: dict[str, Any] = {"bind": f"127.0.0.1:{port}", "data_port": data_port}
        if links:
            near, near_data = free_port(), free_port()
            self.link = Link({near: port, near_data: data_port}, links=clients)
            own["advertise"] = f"*:{near_data}"  # the host that the client dialled
        self._server = self._workers.start("server", serve, own | settings)
        join = JoinString.parse(self._server.recv())
        hosts = [(host_of(index), near) if links else ("127.0.0.1", port) for index in range(clients)]
        self.joins = [str(JoinString(join.key, host, to, join.run)) for host, to in hosts]

    @property
    def log(self) -> Path:
        """The server's log; of replicas, rank 0's."""
        return self._out / "log.jsonl"

    @property
    def logs(self) -> list[Path]:
        """The log of each replica, or the server's alone."""
        return [self.log, *sorted(self._out.glob("log-*.jsonl"))]

    def start(self, target: Any, *args: Any, role: str = "clients") -> Connection:
        """One more process: ``target(pipe, *args)``, which ends when it receives None."""
        return self._workers.start(role, target, *args)

    def cpu_seconds(self) -> dict[str, float]:
        """CPU seconds used so far by the processes of each role, the server's being ``server``."""
        return self._workers.cpu_seconds()

    def peak_memory(self) -> int:
        """The resident high-water mark of the server process, or of all its replicas together, bytes."""
        if self._replicas is not None:
            return self._replicas.peak_memory()
        self._server.send("memory")
        return int(self._server.recv())

    def close(self) -> None:
        self._workers.stop()
        if self._replicas is not None:
            self._replicas.stop()
        if self.link is not None:
            self.link.close()
        self._work.cleanup()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def batch_of(rows: int, length: int, seed: int) -> dict[str, Any]:
    """Random tokens ``(rows, length)`` with their labels."""
    import torch

    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def optimizer_of(model: Any) -> Any:
    """The optimizer of all benchmarks, over all of a model."""
    from splitfl.config import OptimizerSettings
    from splitfl.optimizer import build_optimizer

    return build_optimizer(model.parameters(), OptimizerSettings(learning_rate=LEARNING_RATE))


def train(pipe: Connection, model_dir: str, join: str, key: str, shape: Sequence[int], seed: int) -> None:
    """Worker: one client with real ends, all weights trained, one thread. Command: (micro-batches, steps) -> the wall clock at
    the end of each step; between commands the client has withdrawn from the run's steps.
    """
    import time

    import torch

    from client_ends import SplitModelForCausalLM
    from splitfl.adapters import set_trainable

    torch.set_num_threads(1)
    model = SplitModelForCausalLM.from_pretrained(model_dir, join, key, device="cpu")
    set_trainable(model, "full")
    model.train()
    optimizer = optimizer_of(model)
    batch = batch_of(shape[0], shape[1], seed)
    pipe.send("ready")
    while (command := pipe.recv()) is not None:
        model.trunk.micro_batches, steps = command
        ends = []
        for _ in range(steps):
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ends.append(time.time())
        model.trunk.session.pause()
        model.wait_step()
        pipe.send(ends)
    model.close()
