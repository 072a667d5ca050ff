"""Can this architecture be split? Found out by running it small, before anything is loaded.

The model's own class is built from its own config without storage; its blocks are replaced by parameterless probes that
record their arguments and answer with fresh random numbers; what lies around the blocks gets small random weights. Then
the full model and the trunk run in training mode, dropout on, on padded and packed rows. The trunk can stand in for the
middle of the model if

- nothing happens to the hidden state between one block and the next;
- each block of the trunk receives the arguments it receives in the full model, to the bit, from ``(h, attention_mask,
  position_ids)`` alone;
- a trunk whose blocks pass everything through returns ``h`` to the bit.

An architecture that fails is refused with a ModelError of one sentence. What a model's code raises when it is run this
way may be anything, hence the broad ``except`` clauses.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from splitfl.errors import ModelError, kind_and_line
from splitfl.parts.arguments import channel_between_blocks, contains, first_difference, keeps_apart
from splitfl.parts.blocks import Layout, StandIn, find_blocks, hidden_argument
from splitfl.parts.cut import Cut
from splitfl.parts.ends import ends_class, make_ends
from splitfl.parts.trunk import make_trunk, trunk_class

ROWS, TOKENS, RESTART, VOCABULARY = 2, 6, 4, 8


@dataclass
class _Call:
    """One block's arguments in one run."""

    hidden: torch.Tensor
    rest: dict[str, Any]


class _ProbeBlock(StandIn):
    """Records what it is given; answers with its own fixed random hidden state, or passes through."""

    def __init__(self, block: nn.Module, calls: list[_Call]) -> None:
        super().__init__(block, 0)
        self.signature = inspect.signature(block.forward)
        self.calls = calls
        self.reply: torch.Tensor | None = None
        self.extra: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_argument(args, kwargs)
        if self.reply is not None and hidden.shape != self.reply.shape:
            raise ModelError(
                f"the hidden state between its blocks has shape {tuple(hidden.shape)} where {tuple(self.reply.shape)} "
                "(rows, tokens, hidden size) is what can travel"
            )
        bound = self.signature.bind_partial(*args, **kwargs).arguments
        first = next(iter(bound))
        bound.update(bound.pop("kwargs", {}))
        self.calls.append(_Call(hidden, {name: value for name, value in bound.items() if name != first}))
        answer = self.answer(hidden if self.reply is None else self.reply)
        if self.extra is None or not isinstance(answer, tuple):
            return answer
        return (answer[0], *[self.extra] * (len(answer) - 1))


def probe(full: type[PreTrainedModel], config: Any, cut: Cut) -> Layout:
    """The layout of an architecture that can be cut there. Raises ModelError, in one sentence, for one that cannot."""
    refuse_config(full.__name__, config)
    text = config.get_text_config(decoder=True)
    count = getattr(text, "num_hidden_layers", None)
    if not isinstance(count, int):
        raise ModelError(f"{full.__name__} cannot be split: its config names no number of blocks (num_hidden_layers)")
    cut.trunk_range(count)
    with _quiet():
        model, layout = skeleton(full, config, count)
        return _probe(full, model, layout, cut)


def refuse_config(name: str, config: Any) -> None:
    """What a config alone rules out. Raises ModelError."""
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} cannot be split: it is an encoder-decoder, whose decoder blocks all read the encoder")
    if getattr(text, "output_router_logits", False):
        raise ModelError(
            f"{name} cannot be split with output_router_logits=True: the auxiliary loss multiplies sums over all "
            "blocks; set output_router_logits to false in the config"
        )
    for field in ("layerdrop", "decoder_layerdrop"):
        if getattr(text, field, 0.0):
            value = getattr(text, field)
            raise ModelError(f"{name} cannot be split with {field}={value}: blocks are skipped at random; set it to 0")


def skeleton(full: type[PreTrainedModel], config: Any, count: int | None = None) -> tuple[PreTrainedModel, Layout]:
    """The full model without storage (meta tensors), and where its blocks are."""
    config = copy.deepcopy(config)
    if count is None:
        count = config.get_text_config(decoder=True).num_hidden_layers
    build: Any = full._from_config
    try:
        with torch.device("meta"), _quiet():
            model: PreTrainedModel = build(config)
    except Exception as error:
        raise ModelError(f"{full.__name__} cannot be built from this config ({kind_and_line(error)})") from error
    path = find_blocks(model, count)
    backbone, parameters = _find_backbone(full.__name__, model, path)
    layout = Layout(
        blocks=path,
        count=count,
        backbone=backbone,
        hidden_size=config.get_text_config(decoder=True).hidden_size,
        positions="position_ids" in parameters,
        longest=_longest(config.get_text_config(decoder=True)),
    )
    return model, layout


def _longest(text: Any) -> int | None:
    """Up to where a rotary table that grows with the longest row of a batch stays as it is; None if it never grows."""
    parameters = getattr(text, "rope_parameters", None) or {}
    each = parameters.values() if all(isinstance(value, dict) for value in parameters.values()) else [parameters]
    limits = [
        one.get("original_max_position_embeddings") or text.max_position_embeddings
        for one in each
        if one.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)


def _find_backbone(name: str, model: PreTrainedModel, blocks: str) -> tuple[str, Any]:
    """The outermost module around the blocks, inside the model, that takes embeddings and a mask; its parameters."""
    names = blocks.split(".")[:-1]
    for end in range(1, len(names) + 1):
        path = ".".join(names[:end])
        parameters = inspect.signature(type(model.get_submodule(path)).forward).parameters
        if "inputs_embeds" in parameters and "attention_mask" in parameters:
            return path, parameters
    raise ModelError(f"{name} cannot be split: no module around its blocks takes inputs_embeds and an attention_mask")


def _probe(full: type[PreTrainedModel], model: PreTrainedModel, layout: Layout, cut: Cut) -> Layout:
    name = full.__name__
    calls: list[_Call] = []
    blocks = layout.block_list(model)
    for index in range(layout.count):
        blocks[index] = _ProbeBlock(blocks[index], calls)
    backbone = model.get_submodule(layout.backbone)
    _give_storage(backbone, blocks)
    model.train()
    trunk = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    probes: list[Any] = list(blocks)
    for block in probes:
        block.reply = torch.randn(ROWS, TOKENS, layout.hidden_size, generator=generator).to(model.dtype)
        block.extra = torch.randn(1, generator=generator)
    layout = replace(layout, tuple_length=_tuple_length(name, layout, backbone, probes, calls))
    for block in (*probes, *layout.block_list(trunk)):
        block.tuple_length = layout.tuple_length
    trunk.__class__ = trunk_class(full, layout, cut)
    make_trunk(trunk, layout, cut)
    _check_ends(full, layout, cut, model)
    packing = False
    for label, mask, positions in _layouts(layout.positions):
        _run_full(name, layout, backbone, probes, calls, mask, positions)
        _check_trunk(name, layout, cut, trunk, calls, mask, positions, label)
        if label == "packed":
            packing = all(keeps_apart(call.rest, RESTART) for call in calls)
    # A recurrent block carries its state over a restart, whatever mask it is given.
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    recurrent = any("attention" not in kind or "linear" in kind for kind in kinds)
    return replace(layout, packing=packing and not recurrent)


def _tuple_length(name: str, layout: Layout, backbone: nn.Module, probes: list[Any], calls: list[_Call]) -> int:
    """How many items the backbone expects of a block, 0 for a bare tensor: the first form with which it runs."""
    furthest, refusal = -1, ModelError(f"{name} cannot be split")
    for length in range(4):
        for block in probes:
            block.tuple_length = length
        try:
            _run_full(name, layout, backbone, probes, calls, None, None)
        except ModelError as error:
            # In a wrong form a run breaks off early and its reason says nothing: keep that of the longest run.
            if len(calls) > furthest:
                furthest, refusal = len(calls), error
        else:
            return length
    raise refusal


def _run_full(
    name: str,
    layout: Layout,
    backbone: nn.Module,
    probes: list[Any],
    calls: list[_Call],
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> None:
    """Runs the full backbone; one of ``calls`` a block. Raises ModelError where they are no plain chain."""
    calls.clear()
    tokens = torch.randint(1, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3))
    arguments: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
    if positions is not None:
        arguments["position_ids"] = positions
    try:
        with torch.no_grad():
            out = backbone(**arguments, use_cache=False, return_dict=True).last_hidden_state
    except ModelError as error:
        raise ModelError(f"{name} cannot be split: {error}") from error
    except Exception as error:
        raise ModelError(f"{name} cannot be split: without its blocks it does not run ({kind_and_line(error)})") from error
    if len(calls) != layout.count:
        raise ModelError(f"{name} cannot be split: {layout.blocks} has {layout.count} blocks, but {len(calls)} are run")
    for index, call in enumerate(calls):
        channel = channel_between_blocks(call.rest)
        for other in probes[:index]:
            channel = channel or contains(call.rest, other.extra)
        if channel:
            raise ModelError(f"{name} cannot be split: its blocks hand each other more than the hidden state: {channel}")
        if index and not torch.equal(call.hidden, probes[index - 1].reply):
            raise ModelError(
                f"{name} cannot be split: something is applied to the hidden state between blocks {index - 1} and {index}"
            )
    if tuple(out.shape[:2]) != (ROWS, TOKENS):
        raise ModelError(f"{name} cannot be split: its last hidden state has shape {tuple(out.shape)}")


def _layouts(positions: bool) -> Iterator[tuple[str, torch.Tensor | None, torch.Tensor | None]]:
    """Masks (B, T) and positions (B, T) that between them use every way of laying out a batch."""
    left = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    left[1, :2] = 0
    yield "unpadded", None, None
    yield "left-padded", left, None
    yield "right-padded", left.flip(1), None
    if positions:
        plain = torch.arange(3, 3 + TOKENS).expand(ROWS, -1)
        packed = torch.cat([torch.arange(RESTART), torch.arange(TOKENS - RESTART)]).expand(ROWS, -1)
        yield "positioned", left, plain
        yield "packed", None, packed


class _ReachedError(Exception):
    """Raised by the probe's trunk: what comes after it needs no probing."""


def _check_ends(full: type[PreTrainedModel], layout: Layout, cut: Cut, model: PreTrainedModel) -> None:
    """Calls the whole model as users do and sees whether the trunk slot is given their mask and positions."""
    ends: Any = copy.deepcopy(model)
    ends.__class__ = ends_class(full, layout, cut)
    make_ends(ends, layout, cut)
    seen: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []

    def trunk(h: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        seen.append((mask, positions))
        raise _ReachedError

    ends.trunk_slot.attach(trunk)
    for _, mask, positions in _layouts(layout.positions):
        arguments: dict[str, Any] = {"input_ids": torch.ones(ROWS, TOKENS, dtype=torch.int64), "attention_mask": mask}
        if positions is not None:
            arguments["position_ids"] = positions
        try:
            with suppress(_ReachedError), torch.no_grad():
                ends(**arguments)
        except Exception as error:
            raise ModelError(
                f"{full.__name__} cannot be split: it does not run with a trunk slot ({kind_and_line(error)})"
            ) from error
        reached, counted = seen.pop() if seen else (None, positions)
        # Some heads take no positions and drop them unread: the unsplit model then runs without them as well.
        if first_difference(mask, reached, "mask") or (counted is not None and first_difference(positions, counted, "positions")):
            raise ModelError(f"{full.__name__} cannot be split: its mask and positions do not reach its blocks' owner")


def _check_trunk(
    name: str,
    layout: Layout,
    cut: Cut,
    trunk: Any,
    calls: list[_Call],
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    label: str,
) -> None:
    """Runs the trunk with empty blocks and compares what each of its blocks is given with ``calls``."""
    held = cut.trunk_range(layout.count)
    own: list[_Call] = []
    for index in held:
        block: Any = layout.block_list(trunk)[index]
        block.calls = own
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(ROWS, TOKENS, layout.hidden_size, generator=generator).to(calls[0].hidden.dtype)
    try:
        with torch.no_grad():
            y = trunk.trunk_forward(h, mask, positions)
    except Exception as error:
        raise ModelError(
            f"{name} cannot be split: its trunk does not run from a hidden state ({kind_and_line(error)})"
        ) from error
    if len(own) != len(held):
        raise ModelError(f"{name} cannot be split: of the trunk's {len(held)} blocks {len(own)} are run")
    for index, call in zip(held, own, strict=True):
        if not torch.equal(call.hidden, h):
            raise ModelError(f"{name} cannot be split: the hidden state does not reach the trunk's block {index} unchanged")
        differing = first_difference(calls[index].rest, call.rest)
        if differing is not None:
            raise ModelError(
                f"{name} cannot be split: block {index} receives {differing}, which cannot be rebuilt from the hidden "
                f"state, the mask and the positions ({label} rows)"
            )
    if not torch.equal(y, h):
        raise ModelError(f"{name} cannot be split: a trunk of empty blocks does not return the hidden state it is given")


def _give_storage(backbone: nn.Module, blocks: nn.ModuleList) -> None:
    """Small random weights for what is left beside the blocks; embeddings are cut to a few rows."""
    for owner in list(backbone.modules()):
        for name, child in list(owner.named_children()):
            # A whole other model in there, as for images: text never enters it.
            if isinstance(child, PreTrainedModel) and not any(module is blocks for module in child.modules()):
                setattr(owner, name, nn.Identity())
    for module in backbone.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings > 64:
            module.weight = nn.Parameter(module.weight[:64], requires_grad=False)
            module.padding_idx = None
    backbone.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*backbone.parameters(), *backbone.buffers()):
            tensor.zero_()
    for module in backbone.modules():
        vars(module).pop("_is_hf_initialized", None)
    if isinstance(backbone, PreTrainedModel):
        # Rotary tables and other buffers by the family's own code; where that asks for the blocks, zeros will do.
        initialize: Any = backbone.initialize_weights
        with suppress(Exception):
            initialize()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings about a model that nobody will use, and the caller's random numbers as if there had been none."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        logger.setLevel(level)
