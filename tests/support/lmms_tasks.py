"""Tasks of lmms-eval on pictures of the demo, written to a directory; run as a program, they are evaluated.

python -m tests.support.lmms_tasks DIRECTORY RUNS.json RESULTS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hidrop_fx.demo.pictures import picture, questions

SECOND = "Which word is there?"
"""The question of the second round."""
UTILS = f'''
from PIL import Image

def visual(doc):
    return [Image.open(path) for path in doc["images"]]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def rounds(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if not round_idx:
        return doc["question"]
    if round_idx == 1:
        return visual(doc), "{SECOND}", False, previous_output, "seen"
    assert previous_round_info == "seen" and len(previous_output) == 2
    return None, None, True, previous_output, None

def score(doc, results):
    return {{"exact_match": 1.0}}
'''
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output_type}
doc_to_visual: !function utils.visual
doc_to_text: !function utils.{text}
doc_to_target: answer
generation_kwargs: {{max_new_tokens: {new_tokens}, until: ["#"], temperature: 0, image_aspect_ratio: original}}
{scored}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
NEW_TOKENS = 4


def write_tasks(directory: Path) -> list[dict[str, Any]]:
    """Write the tasks `drawn` and `drawn_rounds`, and return their documents: no, one and two images."""
    documents = []
    for seed, images in enumerate((1, 2, 1, 0, 1)):
        shown = [picture(seed + 10 * i, "test") for i in range(images)]
        paths = []
        for i, one in enumerate(shown):
            paths.append(str(directory / f"{seed}_{i}.png"))
            one.image.save(paths[-1])
        asked = questions(picture(seed, "test"), seed)[seed % 3]
        documents.append({"images": paths, "question": asked.sentence, "answer": asked.answer})
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in documents))
    (directory / "utils.py").write_text(UTILS)
    common = {"data": data, "new_tokens": NEW_TOKENS}
    (directory / "drawn.yaml").write_text(
        TASK.format(name="drawn", output_type="generate_until", text="text", scored="", **common)
    )
    (directory / "drawn_rounds.yaml").write_text(
        TASK.format(
            name="drawn_rounds",
            output_type="generate_until_multi_round",
            text="rounds",
            scored="process_results: !function utils.score",
            **common,
        )
    )
    return documents


def main(directory: Path, runs: Path, results: Path) -> None:
    """Evaluate runs, each {"model_args", "force_simple"}, and write what came out of each."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    from hidrop_fx.evaluation.lmms_plugin import manifest

    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    found = []
    for run in json.loads(runs.read_text()):
        manager = TaskManager("ERROR", include_path=str(directory), include_defaults=False)
        done = simple_evaluate(
            model="hidrop",
            tasks=["drawn", "drawn_rounds"],
            task_manager=manager,
            batch_size=1,
            device="cpu",
            bootstrap_iters=0,
            **run,
        )
        assert done is not None
        found.append({k: done[k] for k in ("results", "samples", "throughput", "config")})
    results.write_text(json.dumps(found, default=str))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
