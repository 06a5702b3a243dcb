"""Frozen weights of the transformer's linear layers in 4 or 8 bits, dequantized where they are used."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sat_ext.errors import ConfigError
from sat_ext.models.config import Quantization

NF4_BLOCK = 64  # weights that share a scale
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448


@dataclass(frozen=True)
class Code:
    """A code for matrices of weights (rows, columns).

    `quantize(weight)` gives bytes (uint8) and scales, integers so that no cast of the model changes them.
    `dequantize(codes, scales, shape, dtype)` gives the matrix, which quantizes to the same codes and scales."""

    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    dequantize: Callable[[Tensor, Tensor, torch.Size, torch.dtype], Tensor]


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn times a power of two for each row, the least with which nothing overflows; its exponent is the
    scale, int8."""
    weight = weight.float()
    # a power of two loses nothing against other scales, since the codes are floating point
    mantissa, exponent = torch.frexp(weight.abs().amax(dim=1) / FP8_MAX)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-100, 100)
    codes = (weight * _power_of_two(-exponent)[:, None]).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), exponent.to(torch.int8)


def from_fp8(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weights, exact in bfloat16 too."""
    factors = _power_of_two(scales.int()).to(dtype)
    return codes.view(torch.float8_e4m3fn).to(dtype).mul_(factors[:, None])


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 to the `exponent`, int32 of -126 to 127, as float32."""
    return ((exponent + 127) << 23).view(torch.float32)  # made of its bits: exact on every device, unlike pow


def to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """bitsandbytes' NF4 in blocks of 64 weights, whose scale is the largest: the bits of a bfloat16, int16."""
    # rounded to bfloat16 first, in which published weights come, so that the largest is exact in the scale
    rounded = weight.to(torch.bfloat16)
    codes, largest = _bitsandbytes().quantize_4bit(rounded, NF4_BLOCK, "nf4", torch.uint8)
    return codes, largest.to(torch.bfloat16).view(torch.int16)


def from_nf4(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weights, rounded to `dtype`."""
    largest = scales.view(torch.bfloat16).float()
    # as one row: on a CPU it reads other blocks' scales if the rows are not multiples of 64 (seen in 0.50.2)
    flat = (shape.numel(),)
    return _bitsandbytes().dequantize_4bit(codes, largest, NF4_BLOCK, "nf4", flat, dtype).view(shape)


def _bitsandbytes() -> Any:
    import_bitsandbytes("model.train.quantization: nf4")
    return torch.ops.bitsandbytes


def import_bitsandbytes(option: str) -> None:
    """Register its operators. Raises `ConfigError`, for `option`, if it is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{option} needs bitsandbytes; pip install bitsandbytes.") from error


CODES = {"fp8": Code(to_fp8, from_fp8), "nf4": Code(to_nf4, from_nf4)}


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose `weight` is bytes, with `scales` beside it; PEFT takes it as a linear layer.

    With `in_state_dict` state dicts hold its weight, dequantized to float32 in CPU memory. Loading a weight
    quantizes it, and one from its own state dict gives the same codes."""

    scales: Tensor

    def __init__(self, linear: nn.Linear, code: Code, *, in_state_dict: bool) -> None:
        nn.Module.__init__(self)  # not Linear's, which would allocate a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.code, self.in_state_dict = code, in_state_dict
        codes, scales = code.quantize(linear.weight.detach())
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight.whole_shape = linear.weight.shape  # type: ignore[attr-defined]
        self.bias = linear.bias
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., out_features), with weights in the dtype of `x`."""
        return _Linear.apply(x, self.weight, self.scales, self.bias, self.read)

    @property
    def W_q(self) -> Tensor:  # noqa: N802 - what PEFT knows a layer by whose weight it gets from `dequantize`
        """The codes."""
        return self.weight

    def dequantize(self) -> Tensor:
        """The weight, whose norms DoRA needs."""
        return self.read(self.weight, self.scales, torch.float32)

    def read(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight (out_features, in_features) of `codes` and `scales`."""
        return self.code.dequantize(codes, scales, torch.Size((self.out_features, self.in_features)), dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = f"{prefix}weight"
        if self.in_state_dict:
            destination[name] = self.read(self.weight.detach(), self.scales, torch.float32).cpu()
        else:
            del destination[name]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        name = f"{prefix}weight"
        weight = state_dict.get(name)
        # one of another shape is left for `super` to report
        if weight is not None and weight.shape == (self.out_features, self.in_features):
            codes, scales = self.code.quantize(weight.to(self.weight.device))
            self.scales.copy_(scales)
            state_dict = {**state_dict, name: codes}
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Linear(torch.autograd.Function):
    """A linear layer that saves its quantized weight for the backward pass through autograd, where checkpointing
    and block swap reach it; bitsandbytes' own keeps it elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, read: Callable[..., Tensor]
    ) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.read = read
        return functional.linear(x, read(codes, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        codes, scales = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ ctx.read(codes, scales, gradient.dtype), None, None, None, None


def quantize_blocks(blocks: nn.ModuleList, quantization: Quantization, *, in_state_dict: bool) -> None:
    """Quantize the weights of all linear layers in the transformer's blocks; biases and norms stay as they are."""
    # here, as the planner reads this module's numbers where diffusers need not import
    from diffusers.models.normalization import CogVideoXLayerNormZero

    for module in list(blocks.modules()):
        # NF4's errors in a timestep's modulation would scale a channel of every token and not average out
        kind = "fp8" if isinstance(module, CogVideoXLayerNormZero) else quantization
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                home = child.weight.device
                if home.type == "cpu" and torch.cuda.is_available():
                    child = child.to("cuda")  # faster there, and one layer fits beside anything
                quantized = QuantizedLinear(child, CODES[kind], in_state_dict=in_state_dict)
                setattr(module, name, quantized.to(home))
