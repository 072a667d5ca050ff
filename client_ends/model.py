"""The Hugging Face face: a client's model is an ordinary ``transformers`` model whose trunk happens to be elsewhere."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers.generation.configuration_utils import GenerationMode

from client_ends.clipping import TrunkGradient, norm_before_clipping
from client_ends.decoding import SplitCache
from client_ends.objective import Objective
from client_ends.observing import ObservedForward
from client_ends.remote import RemoteTrunk
from client_ends.rounds import EndsRounds
from client_ends.session import TrunkSession
from client_ends.stepping import step_with
from splitfl.adapters import named_trainables
from splitfl.channel.opening import OpenTerms
from splitfl.errors import ConfigError, ModelError, StepMissed, UserError
from splitfl.parts.cut import Cut
from splitfl.parts.identity import ModelIdentity, compare, model_identity
from splitfl.parts.loading import Task, attach_trunk, load_ends
from splitfl.parts.weight_layout import lay_out_for_decoding
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import read_identity
from splitfl.protocol.messages import StepClosed, Welcome
from splitfl.tensors import DTYPES, resolve_device

__all__ = ["SplitModelForCausalLM", "SplitModelForSequenceClassification", "open_session"]


def open_session(
    path: str | None,
    join: JoinString,
    identity: Any,
    *,
    cut: Cut | None = None,
    revision: str | None = None,
    adapter: Mapping[str, float] | None = None,
    timeout: float = 10.0,
    reconnect: float = 0.0,
    replaces: str = "",
    channel_options: dict[str, Any] | None = None,
) -> tuple[TrunkSession, str, str | None]:
    """Open a session for the model at ``path`` (None: the hub model the run names).

    ``adapter``: what this client asks for its own adapter in the trunk; see :meth:`_SplitModel.from_pretrained`. ``reconnect``,
    ``replaces``: see :meth:`TrunkSession.open`.

    Returns the session, the model's path or hub id, and its revision. The server refuses another model, revision or cut.

    Raises:
        ModelError: no path given, and the run's model lies on the server's own disk.
        ConnectError, Refused: no session could be opened; the message says why.
    """
    # Hashing a large checkpoint takes long; it is done before the server is made to wait for it.
    mine = model_identity(path, revision=revision) if path is not None else None
    chosen: dict[str, Any] = {"path": path, "revision": revision}

    def answer(welcome: Welcome) -> OpenTerms:
        terms, known = welcome.config, mine
        if known is None:
            if terms["model_is_local"]:
                raise ModelError(f"the run's model {terms['model']!r} is no hub model: say where your copy lies with --model")
            chosen["path"], chosen["revision"] = terms["model"], terms["revision"]
            known = model_identity(terms["model"], revision=terms["revision"])
        used = cut or Cut.parse(terms["cut"])
        return OpenTerms(known.to_plain(), (used.input_blocks, used.output_blocks), dict(adapter or {}))

    session = TrunkSession.open(
        join, identity, answer, timeout=timeout, reconnect=reconnect, replaces=replaces, **(channel_options or {})
    )
    if mine is not None:
        # The server has compared as well; a client does not take its word for which model it trains.
        difference = compare(mine, ModelIdentity.from_plain(session.terms["identity"]))
        if difference:
            session.close()
            raise ModelError(f"your model is not the one this run trains: {difference}")
    return session, chosen["path"], chosen["revision"]


class _SplitModel:
    """What a split model has beside its Hugging Face class. Instances come from :meth:`from_pretrained` alone."""

    _task: ClassVar[Task]
    _remote: RemoteTrunk
    _set_objective: Objective | None
    _declare: Callable[[Mapping[str, Any]], Objective | None] | None
    _on_missed: Callable[[StepMissed], None] | None  # hears that a step did not wait for its end; else that is raised
    _per_token: ClassVar[bool]  # whether each token has a target, or each row
    _trunk_gradient: TrunkGradient | None  # where the run clips both sides together
    _fed_by: tuple[torch.nn.Parameter, ...]  # what trains outside this model, before its embedding: soft prompts

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None,
        trunk: str,
        identity: str | Path,
        *,
        cut: str | tuple[int, int] | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        device: str = "auto",
        attn: str | None = None,
        trust_remote_code: bool = False,
        adapter: Mapping[str, float] | None = None,
        micro_batches: int = 1,
        timeout: float = 10.0,
        reconnect: float = 600.0,
        replaces: str = "",
        channel_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Join a run and load this client's ends.

        Args:
            path: directory or hub id of the model; None takes the hub id the run names.
            trunk: the join string, ``splitfl://KEY@host:port/RUN``.
            identity: this client's secret key file (``splitfl keygen``).
            cut: ``"a:b"`` to insist on a cut; by default the run's own.
            dtype: by default the run's own; another is refused by the server.
            adapter: ``rank``, ``alpha``, ``learning_rate`` and ``weight_decay`` of this client's own adapter in the trunk, as far
                as they shall differ from the run's; only where the run has an adapter for each client, within its limits.
            reconnect: seconds for which a lost link, or a server that is started again, is waited for; calls wait meanwhile.
                0: the first loss ends the session.
            replaces: the session of this client that its process lost when it was killed.
            micro_batches: pieces one batch is cut into, so that network, trunk and ends overlap (helps on slow links).
            kwargs: handed to Hugging Face's ``from_pretrained`` (``num_labels``, ``seed`` of a fresh head, ...).

        Returns:
            A model of the checkpoint's own Hugging Face class: ``forward``, ``backward``, ``generate``,
            ``save_pretrained``, PEFT and optimizers work as on any other. When an optimizer that holds parameters of the ends
            steps, the trunk's step ends too; with frozen ends call :meth:`step`.

        Raises:
            ConnectError, Refused, ModelError, KeyFileError: each one sentence with the mend.
        """
        asked = None if cut is None else Cut.parse(cut) if isinstance(cut, str) else Cut(*cut)
        session, where, revision = open_session(
            None if path is None else str(path),
            JoinString.parse(trunk),
            read_identity(identity),
            cut=asked,
            revision=revision,
            adapter=adapter,
            timeout=timeout,
            reconnect=reconnect,
            replaces=replaces,
            channel_options=channel_options,
        )
        try:
            used = session.terms["dtype"]
            if dtype not in (None, used):
                raise ModelError(
                    f"the run computes in {used}, not {dtype}: leave the dtype out, or ask the operator for a run in {dtype}"
                )
            if session.terms["round_steps"]:
                kwargs["seed"] = session.terms["seed"]  # a fresh head is averaged too: it begins the same for all
            own = Cut.parse(session.terms["cut"])
            try:
                where_to = str(resolve_device(device))
            except ValueError as error:
                raise ConfigError(str(error)) from None
            ends = load_ends(
                where,
                (own.input_blocks, own.output_blocks),
                task=cls._task,
                revision=revision,
                dtype=DTYPES[used],
                device=where_to,
                attn=attn,
                trust_remote_code=trust_remote_code,
                **kwargs,
            )
        except BaseException:
            session.close()
            raise
        return cls._dress(ends, session, micro_batches)

    @classmethod
    def _dress(cls, ends: Any, session: TrunkSession, micro_batches: int) -> Any:
        """Give loaded ends their remote trunk and this class's methods."""
        base = type(ends)
        remote = RemoteTrunk(session, micro_batches=micro_batches)
        # The override is on the class, not a hook: PEFT calls the inner model's `forward` past its hooks.
        ends.__class__ = type(
            base.__name__, (cls, base), {"forward": ObservedForward(base.forward), "__module__": base.__module__}
        )
        object.__setattr__(ends, "_remote", remote)
        object.__setattr__(ends, "_set_objective", None)
        object.__setattr__(ends, "_declare", None)
        object.__setattr__(ends, "_fed_by", ())
        object.__setattr__(ends, "_on_missed", None)
        object.__setattr__(ends, "_trunk_gradient", None)
        object.__setattr__(ends, "_step_hook", step_with(weakref.ref(ends)))
        attach_trunk(ends, remote)
        ends.trunk_slot.register_load_state_dict_pre_hook(_warns_of_loading(session))
        if session.terms["optimizer"]["clipping"] == "joint":
            ends.trunk_slot.trunk_gradient = TrunkGradient(session)
            object.__setattr__(ends, "_trunk_gradient", ends.trunk_slot.trunk_gradient)
        if session.terms["cache_tokens"] and ends.can_generate() and ends.generation_config is not None:
            ends.generation_config.use_cache = True
        if session.terms["round_steps"]:
            session.rounds = EndsRounds(
                session.terms["round_steps"], session.terms["part_bytes"], _trainables_of(weakref.ref(ends))
            )
        return ends

    @property
    def trunk(self) -> RemoteTrunk:
        """The remote trunk; ``trunk.session`` counts bytes and steps, ``trunk.adapter_on = False`` runs the base model."""
        return self._remote

    def step(self, then: str = "continue") -> None:
        """End this client's part of the optimizer step. Called for you when an optimizer of the ends steps.

        ``then="pause"`` withdraws from the next step (to evaluate), ``"leave"`` from all.
        """
        self._remote.session.step_done(then, self._ends_norm())

    def _ends_norm(self) -> float | None:
        """The norm of the ends' gradient before it was clipped, where the run clips both sides together."""
        trunk = self._trunk_gradient
        if trunk is None:
            return None
        norm = norm_before_clipping(self._own_parameters(), trunk.factor)
        trunk.forget()
        return norm

    def _own_parameters(self) -> Iterator[torch.nn.Parameter]:
        """The ends', and soft prompts before them."""
        yield from self.parameters()  # type: ignore[attr-defined]
        yield from self._fed_by

    def wait_step(self) -> StepClosed:
        """Wait until the last step this client took part in has closed at the server; where a round ended with it, the ends then
        hold the average.
        """
        session = self._remote.session
        closed = session.wait_closed(session.step - 1)
        session.settle_round()
        return closed

    def on_checkpoint(self, keep: Callable[[int], None], held: Callable[[], Sequence[int]] = tuple) -> None:
        """Have ``keep(step)`` called whenever the run's checkpoint of ``step`` is due, after the ends' optimizer has stepped and
        before the server is told: what it keeps of the ends (weights, optimizer, random state, data position), the server
        has the trunk for. ``held()``: the steps that are kept, from which :class:`~splitfl.errors.RunWentBack` may want one.
        """
        self._remote.session.keep_with(keep, held)

    @contextlib.contextmanager
    def objective(self, targets: list[int], divisor: float) -> Iterator[None]:
        """State the loss of forwards inside, where it is computed from logits and not by ``labels=``.

        ``targets``: target tokens of each row; ``divisor``: what your loss divides its sum over targets by.
        """
        if divisor <= 0:
            raise UserError("the divisor of a loss must be positive")
        self._set_objective = Objective(tuple(targets), float(divisor), is_stated=True)
        try:
            yield
        finally:
            self._set_objective = None

    @contextlib.contextmanager
    def declaring(self, declare: Callable[[Mapping[str, Any]], Objective | None]) -> Iterator[None]:
        """Of training forwards inside, ``declare(arguments)`` says what their loss is, where it knows better than the labels."""
        self._declare = declare
        try:
            yield
        finally:
            self._declare = None

    def close(self) -> None:
        """Leave the run and end the session."""
        self._step_hook.remove()  # type: ignore[attr-defined]
        self._remote.session.close()


class SplitModelForCausalLM(_SplitModel):
    """A causal language model whose trunk is on a server. See :meth:`from_pretrained`."""

    _task = "causal-lm"
    _per_token = True

    def make_cache(self) -> SplitCache:
        """An empty key-value cache, to be passed as ``past_key_values``: to go on from what ``generate()`` has made, say. It
        makes its own where none is given. What of the ends is frozen is laid out for single tokens, where that is faster.

        Raises:
            ModelError: the trunk keeps none in this run.
        """
        session, layout, cut = self._remote.session, self.layout, self.cut  # type: ignore[attr-defined]
        if not session.terms["cache_tokens"]:
            raise ModelError("the trunk keeps no key-value caches in this run: pass use_cache=False to generate()")
        lay_out_for_decoding(self)  # type: ignore[arg-type]
        config: Any = self.config  # type: ignore[attr-defined]
        return SplitCache(config, cut.trunk_range(layout.count), session, self._remote.takes_adapter)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Hugging Face's hook: ``generate()`` asks for the cache it decodes with. Raises ModelError where that is to be of a kind
        of its own, or where it wants one and there is none.
        """
        if generation_mode == GenerationMode.ASSISTED_GENERATION and not self._remote.session.terms["cache_tokens"]:
            raise ModelError(
                "the trunk keeps no key-value caches in this run, and speculation needs one: leave prompt_lookup_num_tokens and "
                "assistant_model out, or ask the operator for a run with cache_tokens"
            )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            asked = generation_config.cache_implementation
            if asked not in (None, "dynamic", self.generation_config.cache_implementation):  # type: ignore[attr-defined]
                raise ModelError(
                    f"cache_implementation={asked!r} is for a model whose blocks are all here, and the trunk keeps its part of a "
                    "cache in its own way: leave it out"
                )
            model_kwargs["past_key_values"] = self.make_cache()
        else:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, *args, **kwargs
            )
        if generation_config.is_assistant and model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"].activate_past_recording()

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, next_sequence_length: int | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        """Hugging Face's hook: what a forward of ``generate()`` is shown. Speculation that goes on from a filled cache would show
        it, at first, all of the text again.
        """
        # Of a prompt in chunks it shows, rightly, the next chunk, whose mask and positions go on from the cache.
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None:
            is_whole = mask.shape[-1] == input_ids.shape[1]
        else:
            is_whole = positions is not None and positions.shape[-1] == input_ids.shape[1] and int(positions[..., 0].min()) == 0
        if next_sequence_length is None and past_key_values is not None and is_whole:
            next_sequence_length = input_ids.shape[1] - past_key_values.get_seq_length()
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values, **kwargs
        )


class SplitModelForSequenceClassification(_SplitModel):
    """A sequence classifier whose trunk is on a server; labels and head stay here. See :meth:`from_pretrained`."""

    _task = "sequence-classification"
    _per_token = False


def _trainables_of(model: weakref.ref[Any]) -> Callable[[], Mapping[str, torch.nn.Parameter]]:
    def trainables() -> Mapping[str, torch.nn.Parameter]:
        ends = model()
        return {} if ends is None else named_trainables(ends)

    return trainables


def _warns_of_loading(session: TrunkSession) -> Callable[..., None]:
    """A hook of the ends' ``load_state_dict``: what is loaded amid training comes without a trunk."""

    def loading(*_: Any) -> None:
        if session.has_stepped:
            warnings.warn(
                "weights are loaded into the ends, and the trunk stays as its last step left it: load_best_model_at_end, say, "
                "ends with a model whose sides are of different steps",
                stacklevel=2,
            )

    return loading
