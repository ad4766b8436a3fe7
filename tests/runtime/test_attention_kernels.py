"""Which attention kernels a call may take on CUDA: switches of the process, which a CPU build has too."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

import hidrop_fx as hidrop
from hidrop_fx.ops import packed_attention
from hidrop_fx.runtime.attention_kernels import attention_kernels
from tests.support.models import tiny_llava

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def switch() -> Iterator[None]:
    before = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(True)
    yield
    assert cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(before)


def test_cudnn_is_left_out_of_a_call_on_cuda() -> None:
    with attention_kernels(CUDA, cudnn=False):
        assert not cuda.cudnn_sdp_enabled()
        assert cuda.flash_sdp_enabled()
    with attention_kernels(CUDA, cudnn=True):
        assert cuda.cudnn_sdp_enabled()
    with attention_kernels(torch.device("cpu"), cudnn=False):
        assert cuda.cudnn_sdp_enabled()


def test_cudnn_comes_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="inside"), attention_kernels(CUDA, cudnn=False):
        raise ValueError("inside")


def test_calls_of_threads_that_overlap_restore_the_switch_once() -> None:
    """The first one to enter is the first one to leave."""
    entered, leave = threading.Event(), threading.Event()

    def call() -> None:
        with attention_kernels(CUDA, cudnn=False):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=call)
    with attention_kernels(CUDA, cudnn=False):
        thread.start()
        entered.wait(10)
    assert not cuda.cudnn_sdp_enabled()
    leave.set()
    thread.join()


def test_a_caller_who_allows_cudnn_alone_gets_it() -> None:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), attention_kernels(CUDA, cudnn=False):
        assert cuda.cudnn_sdp_enabled()


def test_a_caller_who_turned_cudnn_off_finds_it_off() -> None:
    cuda.enable_cudnn_sdp(False)
    with attention_kernels(CUDA, cudnn=False):
        pass
    assert not cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(True)


def test_cudnn_attention_needs_cuda() -> None:
    with pytest.raises(hidrop.HidropError, match="attention='cudnn' has kernels for CUDA"):
        hidrop.compile(tiny_llava(), "identity", attention="cudnn")


@pytest.mark.parametrize("told", [False, True])
def test_grouped_heads_are_told_where_the_kernel_asks(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.11's `varlen_attn` has no `enable_gqa`."""
    found = {}

    def old(
        query, key, value, sq, sk, mq, mk, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):  # type: ignore[no-untyped-def]
        found["called"] = window_size
        return query

    def new(*args, scale, window_size, enable_gqa):  # type: ignore[no-untyped-def]
        found["called"] = enable_gqa
        return args[0]

    kernel = new if told else old
    assert packed_attention.tells_groups(kernel) is told
    monkeypatch.setattr(packed_attention, "_TELLS_GROUPS", told)
    monkeypatch.setattr(packed_attention.varlen, "varlen_attn", kernel)
    query, key = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8)
    starts = torch.tensor([0, 3], dtype=torch.int32)
    packed_attention.KERNELS["varlen"](query, key, key, starts, 3, 1.0)
    assert found["called"] == (True if told else (-1, 0))
