"""Find a schedule for the shipped model from 64 questions, and test it on others.

    python examples/calibrate.py --refine 50 --held-out 900

With a model of your own, `batches` is all that changes: what its processor makes of your data.
"""

import argparse
import time

from transformers import AutoProcessor, LlavaForConditionalGeneration

import hidrop_fx as hidrop
from hidrop_fx.analysis.data.records import batches_of
from hidrop_fx.analysis.data.samples import prepare_samples
from hidrop_fx.analysis.measuring.layers import full_model
from hidrop_fx.analysis.searching.trials import Trials
from hidrop_fx.demo import MODEL_DIR
from hidrop_fx.demo.records import drawn_records

AVERAGE = 16  # of 144, as 64 is of 576
PRESETS = {
    "hidrop-64 as it scales": hidrop.Schedule.preset("hidrop-64", 12),
    "its tokens scaled, too": hidrop.Schedule.parse("inject=3,prune=4:54+5:3+6:1,exit=9"),
    "concave, tail (3, 1, 1)": hidrop.Schedule.concave(
        inject=3,
        exit=9,
        filters=(4, 5, 6, 7),
        tail=(3, 1, 1),
        average=AVERAGE,
        num_layers=12,
        vision_tokens=144,
    ),
    "concave, tail (10, 5, 1)": hidrop.Schedule.concave(
        inject=3,
        exit=9,
        filters=(4, 5, 6, 7),
        average=AVERAGE,
        num_layers=12,
        vision_tokens=144,
    ),
}

METHODS = (
    "hidrop", "divprune+hidrop", "cdpruner+hidrop", "pooling+hidrop", "divprune", "cdpruner", "pooling",
    "fastv(layer=1)", "v2drop(layers=(1,4,7),keeps=(.5,.25,.1))", "vtw(layer=2)",
    "random(layers=(1,),keeps=(.5,))", "random(layers=(4,5,6),keeps=(.4,.2,.1),inject=3,exit=8)",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--first", type=int, default=500_000, help="seed of the first picture")
    parser.add_argument("--refine", type=int, default=50)
    parser.add_argument("--held-out", type=int, default=900)
    parser.add_argument("--plot", default="calibration.png")
    options = parser.parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR).eval()
    processor = AutoProcessor.from_pretrained(MODEL_DIR)

    records = drawn_records(options.samples, options.first)
    batches = list(batches_of(model, processor, records, batch_size=16, answers=True))
    used = time.process_time()
    calibration = hidrop.calibrate(model, batches, progress=False)
    print(f"calibrated: {calibration.seconds:.0f} s, {time.process_time() - used:.0f} s of CPU")
    best = calibration.schedule(average_vision_tokens=AVERAGE, methods=METHODS)
    candidates = calibration.decisions[-1].candidates
    refined = calibration.refine(best, options.refine)
    print(calibration.table())
    print(f"in all {time.process_time() - used:.0f} s of CPU", flush=True)
    calibration.plot(options.plot)

    print(f"\n{options.held_out} held-out questions\n")
    print("| schedule | | tokens a layer | accuracy | KL |\n|---|---|---|---|---|")
    others = drawn_records(options.held_out, 100_000)
    samples = prepare_samples(
        model, batches_of(model, processor, others, batch_size=50, answers=True)
    )
    trials = Trials(model, samples, full_model(model, samples))
    tried = {f"`{one.name}`": one.schedule for one in candidates}
    rows = {"full model": hidrop.Schedule(), **PRESETS, **tried, "`refine` of the best": refined}
    for name, made in rows.items():
        found = trials.run(made)
        average = hidrop.plan(made, model).average_vision_tokens
        print(
            f"| {name} | `{made}` | {average:.1f} | {found.accuracy:.1%} | {found.mean_kl:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
