"""ZeRO-3 from the first layer on: SAT's layers in `zero.Init`, and networks that are never whole on a rank."""

import argparse
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import nn

from sat_ext.engines import engine_of
from sat_ext.sat.standin import replaced
from sat_ext.zero import zero_of


def parallel_layers(args: argparse.Namespace) -> bool:
    """Symptom: in `deepspeed.zero.Init`, SAT's parallel layers die with "multiple values for argument 'module'".

    DeepSpeed wraps the constructor of every layer in `wrapper(module, *args, **kwargs)`, and SAT hands its layers
    an argument of that very name. Their arguments are given by position instead.
    """
    return zero_of(args).get("stage") == 3


def arguments_by_position(patch: Callable[[Any], None]) -> Callable[[Any], None]:
    """DeepSpeed's patch of all constructors, and ours on top of it for SAT's layers."""
    from sat.mpu.layers import ColumnParallelLinear, RowParallelLinear

    def patch_init_and_builtins(self: Any) -> None:
        patch(self)
        for layer in (ColumnParallelLinear, RowParallelLinear):
            layer.__init__ = _by_position(layer.__init__, layer._old_init)  # `Init` puts `_old_init` back

    return patch_init_and_builtins


def _by_position(wrapped: Callable[..., None], original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @wraps(original)
    def construct(self: nn.Module, /, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        wrapped(*bound.args)

    return construct


def zero3_build(args: argparse.Namespace) -> bool:
    """Symptom: under ZeRO-3, SAT builds the model inside `deepspeed.zero.Init()` without a configuration, which
    rounds every weight to fp16 whatever the training dtype, and no `from_pretrained` works inside it.

    A network of SAT's layers is split up layer by layer while it is built, everything else as soon as it is
    whole: no rank ever holds a network's every weight, in its own memory or on its GPU.
    """
    return zero_of(args).get("stage") == 3


def split_while_built(get_model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """SAT's `get_model`, with a `Partition` in place of DeepSpeed's `Init`."""

    def build_model(args: argparse.Namespace, model_cls: Callable[..., nn.Module], **kwargs: Any) -> nn.Module:
        def build(*arguments: Any, **options: Any) -> nn.Module:
            partition = Partition(args)
            with _layer_by_layer(args, partition):
                model = model_cls(*arguments, **options)
            partition(model)
            return model

        build.__name__ = model_cls.__name__  # SAT shows it
        with replaced(_deepspeed_zero(), "Init", nullcontext):
            return get_model(args, build, **kwargs)

    return build_model


class Partition:
    """Splits parameters up among the ranks, in the training dtype and where the YAML puts them.

    One for a model: it has one set of buffers where the YAML keeps parameters in files.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dtype = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None
        self._convert: Callable[..., None] | None = None

    def __call__(self, module: nn.Module) -> None:
        """Split `module` up but for what is already. Every rank must take part; the first rank's values win."""
        whole = [p for p in module.parameters() if not hasattr(p, "ds_id")]
        for parameter in whole:
            if self.dtype is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(self.dtype)  # as SAT does with a whole model after it is built
        if whole and self._convert is None:
            self._begin(module)
            self._convert = whole[0].convert_to_zero_parameters  # type: ignore[attr-defined]
        elif whole and self._convert is not None:
            self._convert(param_list=whole)

    def _begin(self, module: nn.Module) -> None:
        """As DeepSpeed's engine does with a whole model."""
        from deepspeed.runtime.zero.partition_parameters import (
            Init,
        )  # `deepspeed.zero.Init` itself is replaced meanwhile
        from sat import mpu

        Init(
            module=module,
            data_parallel_group=mpu.get_data_parallel_group(),
            config_dict_or_path=self.args.deepspeed_config,
            mpu=mpu,
        )


@contextmanager
def _layer_by_layer(args: argparse.Namespace, partition: Partition) -> Iterator[None]:
    """Inside, the layers and mixins of CogVideo's network are split up as soon as each is built.

    Other models of SAT's may change their layers after they are built, and a layer that is split up has no shape.
    CogVideo's network has one such change, LoRA, which is given whole layers to change.
    """
    if not engine_of(getattr(args, "model_config", None)).has_sat_network:
        yield
        return
    from sat.model.base_model import BaseModel
    from sat.model.finetune import lora2
    from sat.model.transformer import BaseTransformerLayer

    build, add_mixin = BaseTransformerLayer.__init__, BaseModel.add_mixin
    with_lora = lora2.replace_linear_with_lora

    @wraps(build)
    def build_layer(self: nn.Module, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        partition(self)

    @wraps(add_mixin)
    def add(self: nn.Module, name: str, mixin: nn.Module, reinit: bool = False) -> None:
        add_mixin(self, name, mixin, reinit)
        partition(mixin)

    @wraps(with_lora)
    def replace(linear: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
        with _deepspeed_zero().GatheredParameters(list(linear.parameters())):
            layer: nn.Module = with_lora(linear, *arguments, **options)
        partition(layer)
        return layer

    with (
        replaced(BaseTransformerLayer, "__init__", build_layer),
        replaced(BaseModel, "add_mixin", add),
        replaced(lora2, "replace_linear_with_lora", replace),
    ):
        yield


def _deepspeed_zero() -> Any:
    import deepspeed

    return deepspeed.zero
