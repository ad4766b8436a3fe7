"""Layers of the quantisers that transformers loads models with, by name.

Their weights are packed, and kernels of their own multiply by them; torchao's alone are captured, since their
weights are tensors that override `F.linear` (`hidrop_fx.capture.quantised`).
"""

from torch import nn

from hidrop_fx.capture.four_bit import is_four_bit
from hidrop_fx.errors import UnsupportedModelError

METHODS = {
    "aqlm": ("AQLM", "aqlm"),
    "auto-round": ("AutoRound", "auto_round"),
    "awq": ("AWQ", "awq", "gptqmodel"),
    "bitnet": ("BitNet", "transformers.integrations.bitnet"),
    "bitsandbytes_4bit": ("bitsandbytes", "bitsandbytes"),
    "bitsandbytes_8bit": ("bitsandbytes", "bitsandbytes"),
    "compressed-tensors": (
        *("compressed-tensors", "compressed_tensors"),
        "transformers.integrations.compressed_tensors",
    ),
    "eetq": ("EETQ", "eetq", "transformers.integrations.eetq"),
    "fbgemm_fp8": ("FBGEMM FP8", "fbgemm_gpu", "transformers.integrations.fbgemm_fp8"),
    "fouroversix": ("four over six", "fouroversix", "transformers.integrations.fouroversix"),
    "fp8": ("fine-grained FP8", "transformers.integrations.finegrained_fp8"),
    "fp_quant": ("FP-Quant", "fp_quant", "transformers.integrations.fp_quant"),
    "gemma": ("Gemma's quantisation", "transformers.integrations.gemma_quant"),
    "gguf": ("GGUF", "transformers.integrations.gguf"),
    "gptq": ("GPTQ", "gptqmodel", "auto_gptq", "optimum.gptq"),
    "higgs": ("HIGGS", "flute", "transformers.integrations.higgs"),
    "hqq": ("HQQ", "hqq", "transformers.integrations.hqq"),
    "metal": ("Metal", "transformers.integrations.metal_quantization"),
    "mxfp4": ("MXFP4", "transformers.integrations.mxfp4"),
    "mxfp8": ("MXFP8", "transformers.integrations.finegrained_fp8"),
    "nvfp4": ("NVFP4", "transformers.integrations.nvfp4"),
    "quanto": ("Quanto", "optimum.quanto", "quanto"),
    "quark": ("Quark", "quark"),
    "sinq": ("SINQ", "sinq", "transformers.integrations.sinq"),
    "spqr": ("SpQR", "spqr_quant", "transformers.integrations.spqr"),
    "torchao": ("torchao",),
    "vptq": ("VPTQ", "vptq", "transformers.integrations.vptq"),
}
"""By `quant_method`: a name, and the Python modules that its layers are defined in."""


def name_of_quantiser(module: nn.Module) -> str | None:
    """Return the name of the quantiser that a layer belongs to, several where they share it; else None."""
    names = dict.fromkeys(
        name
        for kind in type(module).__mro__
        for name, *homes in METHODS.values()
        if any(f"{kind.__module__}.".startswith(f"{home}.") for home in homes)
    )
    return " or ".join(names) or None


def check_quantisers(decoder: nn.Module) -> None:
    """Raise for layers of a quantiser whose weights are not captured.

    Raises:
        UnsupportedModelError: names the layer, its class, the quantiser, and what to do instead.
    """
    for path, module in decoder.named_modules():
        name = None if is_four_bit(module) else name_of_quantiser(module)
        if name is not None:
            raise UnsupportedModelError(
                f"{path} of the text decoder is a {type(module).__name__} of {name}, whose packed "
                "weights hidrop_fx does not capture. Quantise with torchao instead: load "
                "without quantization_config and call torchao.quantization.quantize_(model, "
                "Int8WeightOnlyConfig()), or load with TorchAoConfig; or call model.dequantize()"
            )
