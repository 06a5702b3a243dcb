"""The frozen weights below a LoRA in 4 or 8 bits: NF4 of bitsandbytes, or FP8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sat_ext.errors import ConfigError
from sat_ext.models.levers import Quantization

FP8 = torch.float8_e4m3fn
FP8_LARGEST = torch.finfo(FP8).max  # 448


def quantize_blocks(transformer: Any, kind: Quantization) -> None:
    """Replace the linear layers of the blocks of `transformer`, of diffusers, before its LoRA is added.

    Everything else (norms, embeddings, the last layer) stays as it is: it is 0.5 % of CogVideoX-5B. Raises
    `ConfigError` where bitsandbytes is not installed.
    """
    if kind == "none":
        return
    make: Callable[[nn.Linear], nn.Module] = Float8Linear.of if kind == "fp8" else nf4_linear
    if kind == "nf4":
        transformer.is_loaded_in_4bit = True  # peft then takes its LoRA for such layers
    for block in transformer.transformer_blocks:
        for name, layer in list(block.named_modules()):
            if type(layer) is nn.Linear:
                owner = block.get_submodule(name.rpartition(".")[0])
                setattr(owner, name.rpartition(".")[2], make(layer))


def bitsandbytes(key: str) -> Any:
    """The package, for the YAML's `key`. Raises `ConfigError` where it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(f"{key}: nf4 and int8 need bitsandbytes ({error}); pip install bitsandbytes.") from error
    return bitsandbytes


def nf4_linear(layer: nn.Linear) -> nn.Module:
    """`layer` in NF4, quantized on the GPU where there is one: 0.5 bytes a weight, and 0.016 for the scales of
    blocks of 64, quantized themselves (Dettmers et al. 2023, "QLoRA", section 3)."""
    library = bitsandbytes("model.train.quantization")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantized: nn.Linear = library.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    quantized.weight = library.nn.Params4bit(
        layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=quantized
    ).to(device)
    quantized.bias = layer.bias
    return without_repacking(quantized)


def without_repacking(model: nn.Module) -> nn.Module:
    """`model`, whose layers of bitsandbytes keep one layout: on some CPUs their first evaluation packs the weights
    anew, for widths of multiples of 64 alone, and training does not take that."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model


class Float8Linear(nn.Linear):
    """A frozen linear layer whose weight is float8_e4m3fn times a power of two for each output.

    The weight is kept as bytes, so that no cast of the model's dtype changes it, and the scales as their
    exponents, int8. It is brought to the input's dtype for each product, and only the bytes are kept for the
    backward pass.
    """

    exponents: Tensor

    @classmethod
    def of(cls, layer: nn.Linear) -> Float8Linear:
        """`layer`, rounded."""
        made = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        weight = layer.weight.data.float()
        largest = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        exponents = torch.ceil(torch.log2(largest / FP8_LARGEST)).clamp(-127, 127)
        rounded = (weight * torch.exp2(-exponents)).to(FP8)
        made.weight = nn.Parameter(rounded.view(torch.uint8), requires_grad=False)
        made.register_buffer("exponents", exponents.to(torch.int8))
        made.bias = layer.bias
        return made

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        product: Tensor = _Float8Product.apply(input, self.weight, self.exponents)
        return product if self.bias is None else product + self.bias


class _Float8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, exponents: Tensor) -> Tensor:
        ctx.save_for_backward(weight, exponents)
        return functional.linear(input, _dequantized(weight, exponents, input.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        weight, exponents = ctx.saved_tensors
        return gradient @ _dequantized(weight, exponents, gradient.dtype), None, None


def _dequantized(weight: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.view(FP8).to(dtype) * torch.exp2(exponents.float()).to(dtype)
