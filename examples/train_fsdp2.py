"""Train under a schedule with the parameters sharded over processes by FSDP2.

    torchrun --nproc-per-node 2 examples/train_fsdp2.py --steps 2

One process a GPU, or processes on a CPU with Gloo. Each takes its own pictures; the model is the one that the package
ships. Rank 0 writes a full checkpoint, which loads in plain transformers, with `hidrop.json` beside it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoProcessor, LlavaForConditionalGeneration

import hidrop_fx as hidrop
from hidrop_fx.demo import MODEL_DIR
from hidrop_fx.demo.pictures import picture, questions


def main() -> None:
    """Shard, train, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(MODEL_DIR))
    parser.add_argument("--schedule", default="hidrop-64")
    parser.add_argument("--backend", default="inductor", help="of hidrop_fx.compile")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=4, help="of each process, in a step")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16, keep fp32 weights")
    parser.add_argument("--output", type=Path, help="directory for the checkpoint")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()

    processor = AutoProcessor.from_pretrained(arguments.model)
    model = LlavaForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    model.to(device)  # type: ignore[arg-type]
    hidrop.compile(model, arguments.schedule, backend=arguments.backend)  # on every rank
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if arguments.bf16 else None
    options: dict[str, Any] = {} if policy is None else {"mp_policy": policy}
    mesh = distributed.init_device_mesh(device.type, (world,))
    decoder, tower = model.get_decoder(), model.model.vision_tower
    for layer in (*decoder.layers, *tower.encoder.layers):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    model.train()
    for step in range(arguments.steps):
        first = (step * world + rank) * arguments.rows
        batch = batch_of(processor, range(first, first + arguments.rows)).to(device)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        distributed.all_reduce(mean := loss.detach().clone())
        if rank == 0:
            print(f"step {step}: loss {mean / world:.4f}", flush=True)
    if arguments.output is not None:
        state = get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )  # a collective: every rank calls it, and save_pretrained too
        model.save_pretrained(arguments.output, is_main_process=rank == 0, state_dict=state)
    distributed.barrier()
    distributed.destroy_process_group()


def batch_of(processor: Any, seeds: range) -> Any:
    """Return a batch of pictures, each with one of its questions and the answer."""
    drawn = [picture(seed, "train") for seed in seeds]
    asked = [questions(one, seed)[0] for one, seed in zip(drawn, seeds, strict=True)]
    texts = [f"{each.prompt_text} {each.answer}" for each in asked]
    batch = processor(
        images=[one.image for one in drawn], text=texts, padding=True, return_tensors="pt"
    )
    answers = [len(processor.tokenizer(each.answer)["input_ids"]) for each in asked]
    labels = torch.full_like(batch["input_ids"], -100)
    for row, (ids, mask, count) in enumerate(
        zip(batch["input_ids"], batch["attention_mask"], answers, strict=True)
    ):
        places = mask.nonzero().flatten()[-count:]
        labels[row, places] = ids[places]
    batch["labels"] = labels
    return batch


if __name__ == "__main__":
    main()
