"""What is put around the functions of SAT and DeepSpeed, in one table: `python -m sat_ext.sat.hooks` prints it.

SAT's `training_main` looks its functions up in its module when it calls them, so that another in their place is
called instead: no file of SAT's, DeepSpeed's or CogVideo's is changed.

Our script and CogVideo's take the same road. Either reads `create_dataset_function` of the data class and hands it
to `training_main`; reading it calls `enter` (`dataset.py`), so that `training_main`'s first call, `make_loaders`,
comes through `begun`, which installs the rest. Our script calls `install` itself, earlier: the allocator's
variable and the limit of process groups are best set before there is a GPU in use or a group.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pkgutil import resolve_name
from typing import Any

from rich.console import Console
from rich.table import Table
from sat.helpers import print_rank0

from sat_ext.config import reject_unknown_keys
from sat_ext.sat import excepthook, steps
from sat_ext.sat.checkpoint import wrappers
from sat_ext.sat.fixes import (
    cpu,
    evaluation,
    events,
    launcher,
    loading,
    memory,
    optimizer,
    optimizer_path,
    sampling,
    saving,
    schedule,
    sizes,
    timeout,
    zero3,
)  # fmt: skip
from sat_ext.sat.lists import fill_in
from sat_ext.sat.run import run_of
from sat_ext.sat.settings import settings_of

SAT = "sat.training.deepspeed_training:"
RATE = "sat.training.learning_rates:AnnealingLR."
EVENTS = "tensorboardX.event_file_writer:EventsWriter."


# Whether a repair is needed, by its name in `args.without_fixes`, in the order in which they are made.
FIXES: dict[str, Callable[[argparse.Namespace], bool]] = {
    fix.__name__: fix
    for fix in (
        cpu.cpu_training, cpu.no_compiler, loading.resume, loading.load, saving.save, zero3.parallel_layers,
        zero3.zero3_build, evaluation.evaluation, sampling.zero3_sampling, schedule.lr_schedule,
        memory.empty_cache, memory.expandable_segments, optimizer.ema_optimizer, optimizer_path.optimizer_path,
        sizes.auto_sizes, launcher.launcher, timeout.timeout, events.events,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Hook:
    """`wrap` makes what takes the place of `target`, a `module:function`, of what stood there before. With `fix`
    it is a part of that repair: put in place where the repair is needed, and not left out."""

    target: str
    wrap: Callable[[Any], Any]
    why: str
    fix: str | None = None


def begun(make_loaders: Callable[..., Any]) -> Callable[..., Any]:
    """The first function that `training_main` calls. In it SAT divides by the number of entries in each list."""

    def make(args: argparse.Namespace, *rest: Any, **options: Any) -> Any:
        begin(args)
        fill_in(args)
        return make_loaders(args, *rest, **options)

    return make


ENTRY = (
    Hook("sys:excepthook", excepthook.in_a_sentence, "a user's mistake ends the run in one sentence"),
    Hook(SAT + "make_loaders", begun, "what training_main calls first, before it counts the lists of data"),
)
# Those around one function in the order in which they are put there: each calls the one above it, and SAT's last.
HOOKS = (
    *ENTRY,
    Hook(SAT + "get_model", zero3.split_while_built, "no rank holds all weights of a network", "zero3_build"),
    Hook(
        "deepspeed.runtime.zero.partition_parameters:InsertPostInitMethodToModuleSubClasses.patch_init_and_builtins",
        zero3.arguments_by_position,
        "SAT's layers have an argument of the name that DeepSpeed's wrapper uses",
        "parallel_layers",
    ),
    Hook(SAT + "load_checkpoint", loading.mapped_and_checked, "of SAT's checkpoints: mapped, fitted", "load"),
    Hook(SAT + "load_checkpoint", wrappers.load_full, "a full checkpoint goes around SAT's load, repaired or not"),
    Hook(
        SAT + "setup_model_untrainable_params_and_optimizer",
        optimizer_path.of_its_path,
        "closest to DeepSpeed's initialize, which it gives the optimizer's class",
        "optimizer_path",
    ),
    Hook(
        SAT + "setup_model_untrainable_params_and_optimizer",
        wrappers.set_up_resumable,
        "what trains must be in the checkpoint, before an optimizer is made for it",
    ),
    Hook(
        SAT + "get_learning_rate_scheduler",
        schedule.continued,
        "the rate of SAT's own checkpoints",
        "lr_schedule",
    ),
    Hook(
        SAT + "get_learning_rate_scheduler",
        wrappers.with_saved_state,
        "the last call before the steps: SAT has read the optimizer's rates as scales by now",
    ),
    Hook(RATE + "get_lr", schedule.never_negative, "no division by zero, and no rate below it", "lr_schedule"),
    Hook(RATE + "state_dict", schedule.with_warm_up, "so that a checkpoint has the first steps", "lr_schedule"),
    Hook(SAT + "get_sample_writer", events.or_none, "TensorBoard's file cannot be made", "events"),
    Hook(SAT + "print_args", events.or_unwritten, "nor the list of arguments", "events"),
    Hook(EVENTS + "write_event", events.spared, "a full disk must not end the writer's thread", "events"),
    Hook(EVENTS + "flush", events.spared, "the same", "events"),
    Hook(EVENTS + "close", events.spared, "the same", "events"),
    Hook(SAT + "train", steps.with_spared_workers, "data workers start here, and SIGTERM is the ranks' alone"),
    Hook(SAT + "train_step", steps.counted_step, "between steps all ranks agree whether to stop, and to save"),
    Hook(SAT + "evaluate", evaluation.of_all_samples, "in place of SAT's: the first rank's losses", "evaluation"),
    Hook(SAT + "evaluate", sampling.as_first_rank, "whatever evaluates: its steps sample", "zero3_sampling"),
    Hook(SAT + "evaluate", steps.untouched, "around all that draws random numbers, which are put back"),
    Hook(SAT + "save_checkpoint", saving.whole_weights, "of weights alone: ZeRO-3's from all ranks", "save"),
    Hook(SAT + "save_checkpoint", wrappers.save_sound, "around both kinds: numbers that are not finite stay out"),
    Hook(SAT + "torch", cpu.without_gpu, "calls to a GPU that there is not", "cpu_training"),
    Hook("sat.training.model_io:torch", cpu.without_gpu, "the same", "cpu_training"),
    Hook("sat.training.utils:torch", cpu.without_gpu, "the same", "cpu_training"),
    Hook("deepspeed.comm.torch:build_shm_op", cpu.never_built, "what it compiles, gloo has", "no_compiler"),
    Hook("diffusion_video:torch", memory.emptied_if_full, "of CogVideo's engine, in every step", "empty_cache"),
    Hook("diffusion_video:gc", memory.collected_seldom, "the same", "empty_cache"),
)

_done: set[str] = set()  # of `enter` and `install`, what this process has done


def enter() -> None:
    """Put `ENTRY` in place: from SAT's `make_loaders` on, `begin` is called. Safe to call again."""
    if "enter" not in _done:
        put(ENTRY)
        _done.add("enter")


def install(args: argparse.Namespace) -> None:
    """Put the table in place and make the other repairs, those that `args.without_fixes` does not name; each
    repair is logged in one line. Safe to call again: a process is changed once.

    Raises `ConfigError` for an unknown name, and for what a repair finds that cannot run here.
    """
    enter()
    left_out = settings_of(args).without_fixes
    reject_unknown_keys(left_out, tuple(FIXES), "args.without_fixes")
    if "install" in _done:
        return
    made = []
    for name, fix in FIXES.items():
        if name not in left_out and fix(args):
            made.append(name)
            print_rank0(f"repaired '{name}' (args.without_fixes leaves it out). Without it: {_symptom(name)}")
    put(hook for hook in HOOKS if hook not in ENTRY and (hook.fix is None or hook.fix in made))
    _done.add("install")


def begin(args: argparse.Namespace) -> None:
    """`install`, look at where the run comes from, and show the memory that it is predicted to take. Safe to call
    again.

    Raises `ConfigError`, also where `args.load` is not a checkpoint that can be resumed.
    """
    install(args)
    run_of(args)
    steps.report_of(args)


def put(hooks: Iterable[Hook]) -> None:
    """Put hooks in place, those around one function all at once."""
    for target, around in groupby(hooks, lambda hook: hook.target):
        module, _, path = target.partition(":")
        parent, _, name = path.rpartition(".")
        owner = resolve_name(f"{module}:{parent}")
        function = getattr(owner, name)
        for hook in around:
            function = hook.wrap(function)
        setattr(owner, name, function)


def _symptom(name: str) -> str:
    symptom, _, _ = (FIXES[name].__doc__ or "").partition("\n\n")
    return " ".join(symptom.split()).removeprefix("Symptom: ")


def show() -> None:
    """Print the table, and the repairs that put nothing around a function."""
    console = Console()
    console.width = max(console.width, 130)
    table = Table(title="Around SAT's and DeepSpeed's functions, inside out", title_justify="left")
    for column in ("function", "what is around it", "repair", "why there"):
        table.add_column(column, overflow="fold")
    for target, around in groupby(HOOKS, lambda hook: hook.target):
        for number, hook in enumerate(around):
            file = hook.wrap.__module__.removeprefix("sat_ext.sat.").replace("__main__", "hooks")
            function = "" if number else "\nof ".join(reversed(target.split(":")))
            table.add_row(function, f"{file}.{hook.wrap.__name__}", hook.fix or "", hook.why)
        table.add_section()
    console.print(table)
    others = Table(title="Repairs made at the start, around nothing", title_justify="left")
    for column in ("repair", "without it"):
        others.add_column(column, overflow="fold")
    for name in FIXES:
        if all(hook.fix != name for hook in HOOKS):
            others.add_row(name, _symptom(name))
    console.print(others)


if __name__ == "__main__":
    show()
