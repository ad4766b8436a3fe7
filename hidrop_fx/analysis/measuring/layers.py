"""Measure the full model layer by layer, in one pass over the samples.

    for part in samples:                                  # one decoder call each
        hidden = decoder([own images; reference image])   # 2B rows
        similarity, influence, attention, ILVAS           # from hooks, layer by layer

What is kept between layers is the attention of the last few, [B, heads, vision tokens] each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.analysis.data.samples import Samples
from hidrop_fx.analysis.measuring.attention_mass import AttentionMass
from hidrop_fx.analysis.measuring.attention_similarity import TOPS, WINDOWS, Ilvas, IlvasCurve
from hidrop_fx.analysis.measuring.hooked_decoder import decoder_layers, embed, run_with_hooks
from hidrop_fx.analysis.measuring.influence import Influence, as_reference, text_behind_images
from hidrop_fx.analysis.measuring.query_attention import query_attention, vision_attention
from hidrop_fx.analysis.measuring.similarity import Similarity
from hidrop_fx.analysis.progress_bar import Tick
from hidrop_fx.analysis.searching.trials import head
from hidrop_fx.errors import InputError
from hidrop_fx.ops.columns import pack

_SKETCHED = 32

Curve = tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Curves of the full model over its decoder layers; None where no sample can tell."""

    vision_similarity: Curve
    """Mean cosine between a vision token at the layer's input and output."""
    text_similarity: Curve
    influence: Curve
    """1 - mean cosine of a text token's state under its own and under the reference image."""
    attention_mass: Curve
    """Share of the query rows' attention that goes to vision tokens."""
    attention_entropy: Curve
    """Of that attention over the vision tokens, in nats."""
    ilvas: tuple[IlvasCurve, ...]


@torch.no_grad()
def measure_layers(
    model: Any,
    samples: Sequence[Samples],
    *,
    windows: Sequence[int] = WINDOWS,
    tops: Sequence[int] = TOPS,
    tick: Tick | None = None,
) -> tuple[Measurements, list[Tensor]]:
    """Measure every layer, and compute the full model's log-probabilities beside.

    Args:
        model: compiled or not.
        samples: batches, images encoded.
        windows: layers ahead that ILVAS compares.
        tops: numbers of vision tokens that ILVAS compares.
        tick: called with the number of samples of each finished batch.

    Returns:
        the measurements, and by batch the log-probabilities at its predicting columns, fp32
        [rows, vocabulary] on the CPU.
    """
    layers = len(decoder_layers(model))
    similarity, influence = Similarity(layers), Influence(layers)
    mass, ilvas = AttentionMass(layers), Ilvas(layers, windows, tops)
    reference = next(part.features[0] for part in samples if part.features)
    distributions = []
    for part in samples:
        hidden = _measure_batch(model, part, reference, similarity, influence, mass, ilvas)
        rows = hidden[part.predicting.to(hidden.device)]
        distributions.append(_log_probabilities(model, rows))
        ilvas.end_batch()
        if tick is not None:
            tick(len(part))
    measured = Measurements(
        vision_similarity=similarity.vision.result(),
        text_similarity=similarity.text.result(),
        influence=influence.result(),
        attention_mass=mass.mass.result(),
        attention_entropy=mass.entropy.result(),
        ilvas=ilvas.result(),
    )
    return measured, distributions


@torch.no_grad()
def full_model(model: Any, samples: Sequence[Samples]) -> list[Tensor]:
    """Compute the log-probabilities that `measure_layers` returns, alone."""
    found = []
    for part in samples:
        hidden = run_with_hooks(
            model, embed(model, part, list(part.features)), part.mask, part.position_ids
        )
        rows = hidden[part.predicting.to(hidden.device)]
        found.append(_log_probabilities(model, rows))
    return found


def sketch(reference: Sequence[Tensor]) -> tuple[float, ...]:
    """Project the first rows of [rows, vocabulary] to one number each, under fixed random signs.

    Other weights move it about as much as they move a log-probability; nothing of the text can be read off it.
    """
    rows = torch.cat([part.float() for part in reference])[:_SKETCHED]
    generator = torch.Generator(device="cpu").manual_seed(0)
    bits = torch.randint(2, rows.shape[1:], generator=generator, device="cpu")
    signs = bits.to(rows.dtype) * 2 - 1
    finite = rows.masked_fill(rows.isneginf(), 0)
    found: list[float] = (finite @ signs / math.sqrt(len(signs))).tolist()
    return tuple(found)


def _log_probabilities(model: Any, rows: Tensor) -> Tensor:
    found = head(model, rows).log_softmax(dim=-1)
    if found.isnan().any():
        raise InputError(
            f"the untouched model gives logits that are no numbers, in {model.dtype}: nothing can be "
            "compared with them. Load it in bfloat16 or float32, and check its weights"
        )
    return found


def _measure_batch(
    model: Any,
    part: Samples,
    reference: Tensor,
    similarity: Similarity,
    influence: Influence,
    mass: AttentionMass,
    ilvas: Ilvas,
) -> Tensor:
    """Measure one batch, and return its normalised hidden states [B, L, D] under its own images."""
    rows, device = len(part), model.device
    vision, text, behind = (
        mask.to(device) for mask in (part.vision, part.text, text_behind_images(part))
    )
    valid, queries = part.valid.to(device), part.queries.to(device)
    columns = pack(part.vision, shortest=0).to(device)
    counts = torch.tensor(part.vision_counts, device=device)

    def on_layer(layer: int, before: Tensor, after: Tensor) -> None:
        similarity.add(layer, before[:rows], after[:rows], vision, text)
        influence.add(layer, after[:rows], after[rows:], behind)

    def on_attention(layer: int, attention: Any, normed: Tensor, cos: Tensor, sin: Tensor) -> None:
        own = slice(0, rows)
        cos, sin = cos.expand(len(normed), -1, -1), sin.expand(len(normed), -1, -1)
        weights = query_attention(attention, normed[own], cos[own], sin[own], queries, valid)
        found = vision_attention(weights, queries, columns)
        mass.add(layer, found, counts)
        ilvas.add(layer, found, counts)

    own = embed(model, part, list(part.features))
    other = embed(model, part, [as_reference(reference, len(f)) for f in part.features])
    mask, ids = part.mask, part.position_ids
    hidden = run_with_hooks(
        model,
        torch.cat([own, other]),
        None if mask is None else mask.repeat(2, 1),
        ids if ids is None or len(ids) == 1 else ids.repeat(2, 1),
        on_layer,
        on_attention,
    )
    return hidden[:rows]
