"""Run the untouched decoder with hooks on its layers.

    hidden = run_with_hooks(model, embeds, mask, position_ids, on_layer, on_attention)

    on_layer(k, before, after)                          # states at input and output of layer k
    on_attention(k, self_attn, normed, cos, sin)        # what layer k's attention is about to read

Hooks are on for the length of one call; nothing is kept but what the callbacks keep. The model's own
attention implementation runs, and a compiled model stays compiled: its decoder is called directly.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.analysis.data.samples import Samples
from hidrop_fx.capture.layers import layer_list, text_decoder
from hidrop_fx.errors import UnsupportedModelError

OnLayer = Callable[[int, Tensor, Tensor], None]
OnAttention = Callable[[int, Any, Tensor, Tensor, Tensor], None]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the whole model in eval mode; every module is back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def decoder_layers(model: Any) -> list[Any]:
    """Return the decoder layers, checked for the attention that the measurements read.

    Raises:
        CaptureError: the decoder has no list of its layers.
        UnsupportedModelError: a layer has no attention of its own.
    """
    layers = list(layer_list(text_decoder(model))[1])
    for index, layer in enumerate(layers):
        if not hasattr(getattr(layer, "self_attn", None), "config"):
            raise UnsupportedModelError(
                f"layer {index} of {type(text_decoder(model)).__name__} has no self_attn with a config; "
                "calibration reads what each layer hands to transformers' AttentionInterface"
            )
    return layers


def embed(model: Any, part: Samples, features: list[Tensor]) -> Tensor:
    """Embed token ids, with the image features at the places of the vision tokens: [B, L, D]."""
    embeds: Tensor = model.get_input_embeddings()(part.ids.to(model.device))
    if not features:
        return embeds
    places = part.placeholder.to(embeds.device)
    return embeds.masked_scatter(places[:, :, None], torch.cat(features).to(embeds))


@torch.no_grad()
def run_with_hooks(
    model: Any,
    embeds: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    on_layer: OnLayer | None = None,
    on_attention: OnAttention | None = None,
) -> Tensor:
    """Compute the decoder's normalised hidden states [B, L, D], as transformers does.

    Args:
        model: compiled or not; its decoder is called directly.
        embeds: [B, L, D].
        mask: attention mask [B, L]; None for no padding.
        position_ids: [B or 1, L]; None for the decoder's own.
        on_layer: called after each layer with its index, input and output states.
        on_attention: called before each attention with layer, module, normed states and RoPE tables.
    """
    with ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(model)):
            if on_layer is not None:
                handle = layer.register_forward_hook(_after(index, on_layer), with_kwargs=True)
                stack.callback(handle.remove)
            if on_attention is not None:
                handle = layer.self_attn.register_forward_pre_hook(
                    _before_attention(index, on_attention), with_kwargs=True
                )
                stack.callback(handle.remove)
        output = text_decoder(model)(
            inputs_embeds=embeds,
            attention_mask=None if mask is None else mask.to(embeds.device),
            position_ids=None if position_ids is None else position_ids.to(embeds.device),
            use_cache=False,
        )
    hidden: Tensor = output.last_hidden_state
    return hidden


def _after(index: int, on_layer: OnLayer) -> Callable[..., None]:
    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        on_layer(index, before, output[0] if isinstance(output, tuple) else output)

    return hook


def _before_attention(index: int, on_attention: OnAttention) -> Callable[..., None]:
    def hook(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        normed = args[0] if args else kwargs["hidden_states"]
        cos, sin = kwargs["position_embeddings"] if len(args) < 2 else args[1]
        on_attention(index, attention, normed, cos, sin)

    return hook
