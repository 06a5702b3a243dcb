"""ZeRO-3: networks that are never whole on a rank, SAT's layers in `zero.Init`, and samples from all ranks."""

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import Init
from sat import mpu
from sat.model.base_model import BaseModel
from sat.model.finetune import lora2
from sat.model.transformer import BaseTransformerLayer
from sat.mpu.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn

from sat_ext.engines import engine_of
from sat_ext.sat.standin import replaced
from sat_ext.zero import zero_of


def parallel_layers(args: argparse.Namespace) -> bool:
    """Symptom: SAT's parallel layers die in `deepspeed.zero.Init`: "multiple values for argument 'module'"."""
    return zero_of(args).get("stage") == 3


def arguments_by_position(patch: Callable[[Any], None], init: Any) -> None:
    """DeepSpeed's patch of all constructors, and ours on top of it for SAT's layers."""
    patch(init)
    for layer in (ColumnParallelLinear, RowParallelLinear):
        layer.__init__ = _by_position(layer.__init__, layer._old_init)  # `Init` puts `_old_init` back


def _by_position(wrapped: Callable[..., None], original: Callable[..., None]) -> Callable[..., None]:
    """DeepSpeed's `wrapper(module, *args, **kwargs)` of a constructor that has a keyword argument `module` too."""
    signature = inspect.signature(original)

    @wraps(original)
    def construct(self: nn.Module, /, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        wrapped(*bound.args)

    return construct


def zero3_build(args: argparse.Namespace) -> bool:
    """Symptom: under ZeRO-3, SAT builds the model inside `deepspeed.zero.Init()` without a configuration, which
    rounds every weight to fp16 whatever the training dtype, and no `from_pretrained` works inside it."""
    return zero_of(args).get("stage") == 3


def split_while_built(
    get_model: Callable[..., nn.Module],
    args: argparse.Namespace,
    model_cls: Callable[..., nn.Module],
    **kwargs: Any,
) -> nn.Module:
    """SAT's `get_model`. A network of SAT's layers is split layer by layer while it is built, everything else as
    soon as it is whole: no rank ever holds all weights of a network, in its own memory or on its GPU."""

    def build(*arguments: Any, **options: Any) -> nn.Module:
        partition = Partition(args)
        # Other models may change their layers after they are built, and a layer that is split has no shape.
        # CogVideo's network has one such change, LoRA.
        is_cogvideo = engine_of(getattr(args, "model_config", None)).is_cogvideo
        with _layer_by_layer(partition) if is_cogvideo else nullcontext():
            model = model_cls(*arguments, **options)
        partition(model)
        return model

    build.__name__ = model_cls.__name__  # SAT shows it
    with replaced(deepspeed.zero, "Init", nullcontext):
        return get_model(args, build, **kwargs)


class Partition:
    """Splits parameters among the ranks, in the training dtype and where the YAML puts them.

    One for a model: it has one set of buffers where the YAML keeps parameters in files."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dtype = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None
        self._convert: Callable[..., None] | None = None

    def __call__(self, module: nn.Module) -> None:
        """Split what is still whole in `module`. Every rank must take part; the first rank's values win."""
        whole = [p for p in module.parameters() if not hasattr(p, "ds_id")]
        for parameter in whole:
            if self.dtype is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(self.dtype)  # as SAT does with a whole model after it is built
        if whole and self._convert is not None:
            self._convert(param_list=whole)
        elif whole:
            # as DeepSpeed's engine does with a whole model; it also gives parameters the method for the next ones
            group, config = mpu.get_data_parallel_group(), self.args.deepspeed_config
            Init(module=module, data_parallel_group=group, config_dict_or_path=config, mpu=mpu)
            self._convert = whole[0].convert_to_zero_parameters  # type: ignore[attr-defined]


@contextmanager
def _layer_by_layer(partition: Partition) -> Iterator[None]:
    """Inside, SAT's layers and mixins are split as soon as each is built."""
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
        with deepspeed.zero.GatheredParameters(list(linear.parameters())):  # LoRA reads the shape of its base
            layer: nn.Module = with_lora(linear, *arguments, **options)
        partition(layer)
        return layer

    with (
        replaced(BaseTransformerLayer, "__init__", build_layer),
        replaced(BaseModel, "add_mixin", add),
        replaced(lora2, "replace_linear_with_lora", replace),
    ):
        yield


def zero3_sampling(args: argparse.Namespace) -> bool:
    """Symptom: under ZeRO-3, an evaluation of CogVideo's hangs: its first rank alone samples videos, and waits for
    the others' parts of the weights."""
    is_cogvideo = engine_of(getattr(args, "model_config", None)).is_cogvideo
    return zero_of(args).get("stage") == 3 and is_cogvideo and getattr(args, "model_parallel_size", 1) == 1


def as_first_rank(evaluate: Callable[..., Any], *arguments: Any, hooks: dict[str, Any], **options: Any) -> Any:
    """An evaluation in which every rank samples its own batch, as CogVideo's script has its first rank do."""
    hooks = {**hooks, "forward_step_eval": _as_first_rank(hooks["forward_step_eval"])}
    return evaluate(*arguments, hooks=hooks, **options)


def _as_first_rank(forward_step: Callable[..., Any]) -> Callable[..., Any]:
    def step(data: Iterator[Any], *rest: Any, **options: Any) -> Any:
        batch = next(data)  # before, because SAT's loader asks for the rank too, and must get the true one
        rank, script = mpu.get_data_parallel_rank, sys.modules["__main__"]

        def first() -> int:
            # the script asks once before it samples; the loss needs the true one
            mpu.get_data_parallel_rank = rank
            return 0

        with ExitStack() as stack:
            if hasattr(script, "save_texts") and rank() != 0:  # all ranks would write the same file of captions
                stack.enter_context(replaced(script, "save_texts", lambda *texts: None))
            stack.enter_context(replaced(mpu, "get_data_parallel_rank", first))
            return forward_step(iter([batch]), *rest, **options)

    return step
