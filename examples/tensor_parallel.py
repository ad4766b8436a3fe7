"""Answer, and train, under a schedule with attention heads and channels divided over processes: tensor parallelism.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

One process a GPU, or processes on a CPU with Gloo. All take the same pictures, and compute them together; the model is
the one that the package ships. The checkpoint is whole, and loads in plain transformers, with `hidrop.json` beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import distributed
from train_fsdp2 import batch_of
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.distributed.configuration_utils import DistributedConfig

import hidrop_fx as hidrop
from hidrop_fx.demo import MODEL_DIR
from hidrop_fx.demo.pictures import picture, questions


def main() -> None:
    """Load, compile, answer; train and save where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(MODEL_DIR))
    parser.add_argument("--schedule", default="hidrop-64")
    parser.add_argument("--backend", default="inductor", help="of hidrop_fx.compile")
    parser.add_argument("--rows", type=int, default=4, help="pictures in a step, and to answer")
    parser.add_argument("--steps", type=int, default=0, help="of training, behind the answers")
    parser.add_argument("--output", type=Path, help="directory for the checkpoint")
    arguments = parser.parse_args()

    processor = AutoProcessor.from_pretrained(arguments.model)
    model = LlavaForConditionalGeneration.from_pretrained(
        arguments.model,
        dtype=torch.float32,
        distributed_config=DistributedConfig(tp_plan="auto"),
    )  # starts the process group, NCCL or Gloo
    rank = distributed.get_rank()
    hidrop.compile(model, arguments.schedule, backend=arguments.backend)  # on every rank

    drawn = [picture(seed, "test") for seed in range(arguments.rows)]
    asked = [questions(one, seed)[0] for seed, one in enumerate(drawn)]
    prompts = processor(
        images=[one.image for one in drawn],
        text=[each.prompt_text for each in asked],
        padding=True,
        return_tensors="pt",
    ).to(model.device)
    tokens = model.generate(**prompts, max_new_tokens=8, do_sample=False)
    answers = processor.batch_decode(
        tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True
    )
    if rank == 0:
        print(f"answers: {answers}, expected: {[each.answer for each in asked]}", flush=True)

    # Some parameters are DTensors, others are not: `foreach` takes them one kind at a time.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=False)
    model.train()
    for step in range(arguments.steps):
        first = step * arguments.rows
        loss = model(
            **batch_of(processor, range(first, first + arguments.rows)).to(model.device)
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step}: loss {loss:.4f}", flush=True)
    if arguments.output is not None:
        model.save_pretrained(arguments.output)  # a collective: every rank calls it
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
