"""Ask the shipped model about a batch of pictures, under a schedule.

    python examples/generate.py

With a model of your own, `from_pretrained` and the schedule are all that changes.
"""

from transformers import AutoProcessor, LlavaForConditionalGeneration

import hidrop_fx as hidrop
from hidrop_fx.demo import MODEL_DIR, SCHEDULE_FILE
from hidrop_fx.demo.pictures import picture, prompt


def main() -> None:
    model = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR).eval()
    processor = AutoProcessor.from_pretrained(MODEL_DIR)
    hidrop.compile(model, hidrop.Schedule.parse(str(SCHEDULE_FILE)), backend="eager")

    pictures = [picture(seed, "test") for seed in range(2)]
    question = "What is in the picture?"
    inputs = processor(
        images=[one.image for one in pictures],
        text=[prompt(question)] * len(pictures),
        padding=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    answers = processor.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    for one, answer in zip(pictures, answers, strict=True):
        print("picture:", one.description)
        print("answer: ", answer, end="\n\n")
    print(hidrop.inspect(model))


if __name__ == "__main__":
    main()
