"""FastVLM and PerceptionLM over the towers of timm's that their checkpoints have, where timm is installed.

Elsewhere they are tried over towers of transformers' own (`test_families.py`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

import hidrop_fx as hidrop
from tests.models.test_families import at_rows, generated, labelled, rows_of
from tests.support.families import Case, make_batch
from tests.support.families.case import IMAGE_TOKEN, VIDEO_TOKEN, random_model, text_config
from tests.support.families.tiles import crop_clips, crops, two_entries
from tests.support.families.towers import square
from tests.support.runtimes import compiled_eagerly

pytestmark = [pytest.mark.families, pytest.mark.usefixtures("one_capture_a_model")]
SCHEDULE = hidrop.Schedule(inject=1, prune={1: 1}, exit=2)


def fast_vlm() -> Any:
    """FastViT, a block in each stage, and narrower."""
    sizes = {"inference_mode": True, "layers": [1, 1, 1, 1], "embed_dims": [16, 32, 32, 64]}
    tower = hf.TimmWrapperConfig(
        architecture="fastvit_mci0", do_pooling=True, global_pool="avg", hidden_size=128, model_args=sizes,
    )  # fmt: skip
    config = hf.FastVlmConfig(
        text_config=text_config(hf.Qwen2Config), vision_config=tower, image_token_id=IMAGE_TOKEN
    )
    return random_model(hf.FastVlmForConditionalGeneration, config)


def perception_lm() -> Any:
    sizes = {
        "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": [16, 16], "patch_size": 4,
        "ref_feat_shape": [4, 4], "use_post_transformer_norm": False, "init_values": 0.1, "global_pool": "",
    }  # fmt: skip
    tower = hf.TimmWrapperConfig(
        architecture="vit_pe_lang_large_patch14_448", do_pooling=True, model_args=sizes
    )
    config = hf.PerceptionLMConfig(
        text_config=text_config(hf.LlamaConfig), vision_config=tower, image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN, vision_use_cls_token=True, projector_pooling_ratio=2,
    )  # fmt: skip
    return random_model(hf.PerceptionLMForConditionalGeneration, config)


CASES = (
    Case(name="fast_vlm", make=fast_vlm, images=square),
    Case(
        name="perception_lm",
        make=perception_lm,
        images=crops,
        videos=crop_clips,
        entries=two_entries,
        frames=2,
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_over_a_tower_of_timm_s(case: Case) -> None:
    pytest.importorskip("timm")
    model = case.make()
    batch = make_batch(case, model, rows_of(case))
    labels = labelled(batch)
    with torch.no_grad():
        wanted = at_rows(batch, model(**batch.inputs).logits)
        tokens = generated(model, batch)
    loss = model(**batch.inputs, labels=labels).loss
    with compiled_eagerly(model, hidrop.Schedule()):
        with torch.no_grad():
            found = at_rows(batch, model(**batch.inputs).logits)
            assert generated(model, batch) == tokens
        torch.testing.assert_close(model(**batch.inputs, labels=labels).loss, loss)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)
    with compiled_eagerly(model, SCHEDULE):
        assert hidrop.compare(model, new_tokens=2, **batch.inputs).ok
