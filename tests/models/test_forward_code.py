"""Steps of a forward that no program would run are found in its code, whatever the class."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as hf

from hidrop_fx.models import forward_code


class Plain:
    def forward(
        self: Any, input_ids: Any, pixel_values: Any, attention_mask: Any, **kwargs: Any
    ) -> Any:
        inputs_embeds = self.get_input_embeddings()(input_ids)
        features = self.get_image_features(pixel_values.to(inputs_embeds.dtype))
        mask = self.get_placeholder_mask(inputs_embeds)
        inputs_embeds = inputs_embeds.masked_scatter(mask, features)
        outputs: Any = self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
        )
        return self.output(last_hidden_state=outputs.last_hidden_state)


class ScaledStates:
    def forward(self: Any, inputs_embeds: Any, **kwargs: Any) -> Any:
        outputs = self.language_model(inputs_embeds=inputs_embeds, **kwargs)
        hidden_states = outputs[0] * 2
        return self.output(last_hidden_state=hidden_states)


class WrittenStates:
    def forward(self: Any, inputs_embeds: Any, **kwargs: Any) -> Any:
        outputs = self.language_model(inputs_embeds=inputs_embeds, **kwargs)
        outputs.last_hidden_state += 1
        return outputs


class PartlyWrittenStates:
    def forward(self: Any, inputs_embeds: Any, **kwargs: Any) -> Any:
        hidden = self.language_model(inputs_embeds=inputs_embeds, **kwargs)[0]
        hidden[:, 0] = 0
        return self.output(last_hidden_state=hidden)


class ScaledEmbeddings:
    def forward(self: Any, inputs_embeds: Any, **kwargs: Any) -> Any:
        return self.language_model(inputs_embeds=inputs_embeds * 2, **kwargs)


class AnnotatedEmbeddings:
    def forward(self: Any, inputs_embeds: Any, **kwargs: Any) -> Any:
        inputs_embeds: Any = inputs_embeds * 2
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


class OtherWords:
    def forward(self: Any, input_ids: Any, **kwargs: Any) -> Any:
        input_ids[input_ids == 7] = 8
        inputs_embeds = self.embed_tokens(input_ids)
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


class MoreArguments:
    def forward(self: Any, inputs_embeds: Any, **kwargs: Any) -> Any:
        more = {"scale": 2}
        return self.language_model(inputs_embeds=inputs_embeds, **more)


class ScaledPixels:
    def forward(self: Any, inputs_embeds: Any, pixel_values: Any, **kwargs: Any) -> Any:
        features = self.get_image_features(pixel_values / 255)
        mask = self.get_placeholder_mask(inputs_embeds)
        inputs_embeds = inputs_embeds.masked_scatter(mask, features)
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


@pytest.mark.parametrize(
    ("cls", "steps"),
    [
        (Plain, ()),
        (ScaledStates, ("states",)),
        (WrittenStates, ("states",)),
        (PartlyWrittenStates, ("states",)),
        (ScaledEmbeddings, ("embeddings",)),
        (AnnotatedEmbeddings, ("embeddings",)),
        (OtherWords, ("words",)),
        (MoreArguments, ("**more",)),
        (ScaledPixels, ("pixel_values / 255",)),
    ],
)
def test_steps_around_the_text_decoder_are_found(cls: Any, steps: tuple[str, ...]) -> None:
    assert forward_code.steps_of(cls) == steps


def test_the_first_entry_of_pixels_may_be_all_that_an_encoder_gets() -> None:
    class First:
        def forward(self: Any, inputs_embeds: Any, pixel_values: Any, **kwargs: Any) -> Any:
            features = self.get_image_features(pixel_values[:1])
            mask = self.get_placeholder_mask(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(mask, features)
            return self.language_model(inputs_embeds=inputs_embeds, **kwargs)

        def get_image_features(self: Any, pixel_values: Any) -> Any:
            return pixel_values

    assert forward_code.steps_of(First) == ()
    assert forward_code.first_alone(First, "get_image_features") == {"pixel_values"}


class SomeRows:
    def forward(self: Any, input_ids: Any, pixel_values: Any, keep: Any) -> Any:
        outputs = self.model(input_ids=input_ids, pixel_values=pixel_values, return_dict=True)
        hidden_states = outputs[0]
        kept = hidden_states[:, keep, :]
        logits = self.lm_head(kept)
        loss = None
        return loss, logits


class ScaledRows:
    def forward(self: Any, input_ids: Any) -> Any:
        outputs = self.model(input_ids=input_ids)
        hidden_states = outputs.last_hidden_state / self.config.width
        logits = self.lm_head(hidden_states)
        return logits


class NormedRows:
    def forward(self: Any, input_ids: Any) -> Any:
        outputs = self.model(input_ids=input_ids)
        logits = self.lm_head(self.norm(outputs[0]))
        return logits


class OtherIds:
    def forward(self: Any, input_ids: Any) -> Any:
        input_ids = input_ids.clamp(min=3)
        outputs = self.model(input_ids=input_ids)
        logits = self.lm_head(outputs[0])
        return logits


class OtherPixels:
    def forward(self: Any, input_ids: Any, pixel_values: Any) -> Any:
        outputs = self.model(input_ids=input_ids, pixel_values=pixel_values / 255)
        logits = self.lm_head(outputs[0])
        return logits


def test_rows_of_the_base_model_go_to_the_head_as_they_are() -> None:
    assert forward_code.logit_steps(SomeRows) is None


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (ScaledRows, r"from outputs\.last_hidden_state / self\.config\.width"),
        (NormedRows, r"from self\.norm\(outputs\[0\]\)"),
        (OtherIds, r"its base model is given input_ids = input_ids\.clamp\(min=3\)"),
        (OtherPixels, r"its base model is given pixel_values=pixel_values / 255"),
    ],
)
def test_steps_before_the_head_are_refused(cls: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward_code.logit_steps(cls)


@pytest.mark.skipif(not hasattr(hf, "InklingForConditionalGeneration"), reason="none in this one")
def test_a_class_of_transformers_scales_rows_before_its_head() -> None:
    with pytest.raises(ValueError, match=r"from outputs\[0\] / self\.config\.text_config"):
        forward_code.logit_steps(hf.InklingForConditionalGeneration)
