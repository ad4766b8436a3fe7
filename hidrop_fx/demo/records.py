"""Calibration records of the shipped model: drawn pictures, and questions about them."""

from hidrop_fx.analysis.data.records import Record
from hidrop_fx.demo.pictures import picture, questions


def drawn_records(count: int, first: int = 500_000) -> list[Record]:
    """Draw pictures with questions about them, as the shipped model was trained to answer."""
    records: list[Record] = []
    seed = first
    while len(records) < count:
        drawn = picture(seed, "test")
        records += [
            Record(images=(drawn.image,), prompt=one.sentence, answer=one.answer)
            for one in questions(drawn, seed)
        ]
        seed += 1
    return records[:count]
