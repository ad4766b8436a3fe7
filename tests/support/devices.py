"""Tests on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])
