"""Progress bars over samples, on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Tick = Callable[[int], None]


@contextmanager
def progress_bar(what: str, samples: int, *, shown: bool) -> Iterator[Tick]:
    """Show a bar; yield a function to call with the number of samples just done."""
    with tqdm(total=samples, desc=what, unit="sample", disable=not shown, leave=False) as bar:

        def tick(count: int) -> None:
            bar.update(count)

        yield tick
