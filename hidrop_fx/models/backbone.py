"""Text decoders: which attention masks each takes, read off the code of its own forward.

    if not isinstance(causal_mask_mapping := attention_mask, dict): ...     # a mask for each layer type
    causal_mask = create_causal_mask(..., attention_mask=attention_mask)    # one mask for all layers

A decoder whose code does not tell has a record in `BACKBONES`, by `config.model_type`.
"""

import ast
import inspect
import logging
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any

from torch.nn import ModuleList

from hidrop_fx.capture.layers import TOKENWISE
from hidrop_fx.capture.recurrences import has_known_rule
from hidrop_fx.errors import UnsupportedModelError
from hidrop_fx.ops.masks import CHUNKED
from hidrop_fx.ops.mixers import CONVOLUTION, HYBRID, RECURRENT

logger = logging.getLogger("hidrop_fx")

LAYER_TYPES = ("full_attention", "sliding_attention", CHUNKED)
"""Attention patterns whose masks are known: plain causal, and causal within a window or a chunk."""


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A text decoder, by the form of its attention masks."""

    mask_by_layer_type: bool = False
    """Its forward takes a dict of masks, one for each name in `config.layer_types`."""

    def layer_types(self, config: Any) -> tuple[str, ...]:
        """Return the names in the dict of masks that the decoder takes; empty where one mask serves all layers."""
        if not self.mask_by_layer_type:
            return ()
        split: dict[str, tuple[str, ...]] = {
            HYBRID: ("full_attention", RECURRENT),
            **dict.fromkeys(TOKENWISE, ()),
        }
        return tuple(
            dict.fromkeys(name for kind in config.layer_types for name in split.get(kind, (kind,)))
        )


BACKBONES: dict[str, Backbone] = {}
"""Decoders, by `config.model_type`, whose forward does not tell which masks it takes."""


def infer_backbone(decoder: Any) -> Backbone:
    """Read off a decoder's forward which masks it takes.

    Raises:
        UnsupportedModelError: its code cannot be read, or a layer attends by a rule that is not known.
    """
    kind: Any = type(decoder)
    name, config = kind.__name__, decoder.config
    known = BACKBONES.get(getattr(config, "model_type", ""))
    backbone = known or Backbone(mask_by_layer_type=_takes_dict_of_masks(kind))
    types = dict.fromkeys(getattr(config, "layer_types", None) or ())
    layers: Any = decoder.layers if isinstance(getattr(decoder, "layers", None), ModuleList) else ()
    known_types: tuple[str, ...] = (*LAYER_TYPES, CONVOLUTION, *TOKENWISE)
    if {RECURRENT, HYBRID} & set(types) and any(map(has_known_rule, decoder.modules())):
        known_types = (*known_types, RECURRENT, HYBRID)
    other = [layer for layer in types if layer not in known_types]
    if other:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(map(repr, other))}; hidrop_fx schedules decoders whose "
            f"layers are {', '.join(LAYER_TYPES)}, {CONVOLUTION} (a short causal convolution) or {RECURRENT} by the gated "
            "delta rule or a state space of Mamba or Mamba-2: the code of another recurrence does not say which state a cache must hold behind the prompt, and other "
            "masks have no rule for the tokens that remain"
        )
    if any("original_hidden_states" in signature(layer.forward).parameters for layer in layers):
        raise UnsupportedModelError(
            f"{name} hands the embeddings to its layers beside their hidden states, and hidrop_fx has no table of them for the "
            "tokens that a schedule leaves in a layer. Take a decoder whose layers read hidden states alone"
        )
    if backbone.mask_by_layer_type and not types:
        raise UnsupportedModelError(
            f"{name} takes a mask for each layer type, but its config has no layer_types that name them"
        )
    return backbone


@lru_cache(maxsize=256)
def _takes_dict_of_masks(decoder: Any) -> bool:
    """Return True if forward asks whether its `attention_mask` is a dict."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(decoder.forward)))
    except (OSError, TypeError) as error:
        raise UnsupportedModelError(
            f"the code of {decoder.__name__}.forward cannot be read, so it is not known which attention "
            "masks it takes; add a record for its config.model_type to hidrop_fx.models.BACKBONES"
        ) from error
    found = any(map(_asks_for_dict_of_masks, ast.walk(ast.parse(source))))
    logger.info(
        "%s takes %s", decoder.__name__, "a mask for each layer type" if found else "one mask"
    )
    return found


def _asks_for_dict_of_masks(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or len(node.args) != 2:
        return False
    value, kind = node.args
    names = {n.id for n in ast.walk(value) if isinstance(n, ast.Name)}
    return (
        ast.unparse(node.func) == "isinstance"
        and ast.unparse(kind) == "dict"
        and "attention_mask" in names
    )
