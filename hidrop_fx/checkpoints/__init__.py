"""Checkpoints in other projects' formats, written anew as directories that `from_pretrained` loads."""

from hidrop_fx.checkpoints.importing import ImportedModel, import_llava

__all__ = ["ImportedModel", "import_llava"]
