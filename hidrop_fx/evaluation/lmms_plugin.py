"""What lmms-eval finds under the entry point `lmms_eval.models`: its model `hidrop`."""

from typing import Any

MODEL = "hidrop"


def manifest() -> Any:
    """Return lmms-eval's `ModelManifest` of the model: chat messages, or plain text and images with --force_simple."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=MODEL,
        chat_class_path="hidrop_fx.evaluation.lmms.HidropChat",
        simple_class_path="hidrop_fx.evaluation.lmms.HidropSimple",
    )
