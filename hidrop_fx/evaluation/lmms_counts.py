"""What samples cost, as lmms-eval takes it: counts of each sample, and the throughput of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmms_eval.api.instance import TokenCounts
from lmms_eval.models.model_utils.gen_metrics import log_metrics

from hidrop_fx.evaluation.answering import Answer, AnsweredBatch


@dataclass
class ExecutedTokenCounts(TokenCounts):
    """lmms-eval's counts of a sample, and what its layers ran on; all of it goes into the sample's line."""

    vision_tokens: float | None = None
    """Of a layer, on average over the layers."""
    first_token_seconds: float | None = None
    """From the call of `generate` on the sample's batch until each row had its first token."""
    tokens_per_second: float | None = None
    """Of the sample's answer, over the seconds of its batch."""

    def to_dict(self) -> dict[str, Any]:
        """Return what is known, by name."""
        more = {
            "vision_tokens": self.vision_tokens,
            "first_token_seconds": self.first_token_seconds,
            "tokens_per_second": self.tokens_per_second,
        }
        return super().to_dict() | {k: value for k, value in more.items() if value is not None}


def counts_of(answer: Answer, batch: AnsweredBatch) -> ExecutedTokenCounts:
    """Return the counts of one answer, with the seconds of its batch."""
    return ExecutedTokenCounts(
        input_tokens=answer.prompt_tokens,
        output_tokens=answer.new_tokens,
        vision_tokens=round(answer.vision_tokens, 2),
        first_token_seconds=batch.first_token_seconds,
        tokens_per_second=answer.new_tokens / batch.seconds,
    )


def total_of(counts: Sequence[ExecutedTokenCounts]) -> ExecutedTokenCounts:
    """Add up the tokens of a sample's rounds; vision tokens and seconds are those of a round, on average."""

    def mean(name: str) -> float:
        return sum(getattr(one, name) for one in counts) / len(counts)

    return ExecutedTokenCounts(
        input_tokens=sum(one.input_tokens or 0 for one in counts),
        output_tokens=sum(one.output_tokens or 0 for one in counts),
        vision_tokens=mean("vision_tokens"),
        first_token_seconds=mean("first_token_seconds"),
        tokens_per_second=mean("tokens_per_second"),
    )


def log_throughput(batches: Sequence[AnsweredBatch]) -> None:
    """Hand lmms-eval the throughput of some batches, which it sums up in its results."""
    answers = [answer for batch in batches for answer in batch.answers]
    seconds = sum(batch.seconds for batch in batches)
    tokens = sum(answer.new_tokens for answer in answers)
    decoded = [(b.seconds - b.first_token_seconds) / (b.steps - 1) for b in batches if b.steps > 1]
    more: dict[str, float] = {
        "total_requests": len(answers),
        "ttft": sum(batch.first_token_seconds for batch in batches) / len(batches),
        "vision_tokens": sum(answer.vision_tokens for answer in answers) / len(answers),
    }
    if decoded:
        more["tpot"] = sum(decoded) / len(decoded)
    log_metrics(
        total_elapsed_time=seconds,
        total_gen_tokens=tokens,
        avg_speed=tokens / seconds,
        additional_metrics=more,
    )
