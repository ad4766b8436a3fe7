"""The classifier of an image's cells, run on their pixels: one logit for each.

check_classifier(model, classifier)                # when a model is compiled
logits = classified(classifier, cells)             # fp32 [n] of cells [n, C, p, p]
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hidrop_fx.errors import ScheduleError
from hidrop_fx.models.kept_cells import cell_shape
from hidrop_fx.surroundings import neutral_surroundings


def check_classifier(model: Any, classifier: nn.Module) -> None:
    """Check that a classifier takes the cells of a model's images, without running it on any.

    Raises:
        ScheduleError: it does not, or returns something else than a logit for each.
    """
    with neutral_surroundings(), FakeTensorMode(allow_non_fake_inputs=True):
        classified(classifier, torch.ones(2, *cell_shape(model.model), device="cpu"))


def classified(classifier: nn.Module, cells: Tensor) -> Tensor:
    """Return a logit for each cell, fp32 [n] of pixels [n, C, p, p], in the classifier's own dtype and without gradients.

    Raises:
        ScheduleError: the classifier does not take them, or returns something else.
    """
    weight = next((p for p in classifier.parameters() if p.is_floating_point()), None)
    given = cells if weight is None else cells.to(weight.device, weight.dtype)
    shown, training = list(cells.shape), classifier.training
    try:
        classifier.train(False)  # with the model it may be set to train
        with torch.no_grad():
            found: Any = classifier(given)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ScheduleError(
            f"modules['classifier'] does not take the pixels of {len(cells)} cells, {shown}: "
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}. A cell is the square of patches that the "
            "tower merges to one token"
        ) from error
    finally:
        classifier.train(training)
    if not isinstance(found, Tensor) or found.shape not in ((len(cells),), (len(cells), 1)):
        returned = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ScheduleError(
            f"modules['classifier'] returned {returned} for cells {shown}; return one logit for each, [{len(cells)}]"
        )
    return found.reshape(len(cells)).float()
