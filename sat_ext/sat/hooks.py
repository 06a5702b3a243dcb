"""What is put around the functions of SAT and DeepSpeed, in one table: `python -m sat_ext.sat.hooks` prints it.

SAT's `training_main` looks its functions up in its module when it calls them, so a function put in their place is
called instead: no file of SAT's, DeepSpeed's or CogVideo's is changed.

Our script and CogVideo's take the same road. Both read `create_dataset_function` of the data class and pass it to
`training_main`; reading it calls `enter` (`dataset.py`), so that `training_main`'s first call, `make_loaders`,
goes through `begun`, which installs the rest. Our script calls `install` earlier, because the allocator's variable
and the timeout of process groups are best set before there is a GPU in use or a group."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from itertools import groupby
from pkgutil import resolve_name
from typing import Any

from rich.console import Console
from rich.table import Table
from sat.helpers import print_rank0

from sat_ext.config import reject_unknown_keys
from sat_ext.sat import ema, excepthook, peers, steps
from sat_ext.sat.arguments import fill_in_lists
from sat_ext.sat.checkpoint import load, save
from sat_ext.sat.fixes import cpu, evaluation, events, launcher, memory, optimizer, schedule, sizes, weights, zero3
from sat_ext.sat.memory_report import report_of
from sat_ext.sat.settings import settings_of

SAT = "sat.training.deepspeed_training:"
RATE = "sat.training.learning_rates:AnnealingLR."
EVENTS = "tensorboardX.event_file_writer:EventsWriter."
SET_UP = SAT + "setup_model_untrainable_params_and_optimizer"
SCHEDULER = SAT + "get_learning_rate_scheduler"
PATCH = (
    "deepspeed.runtime.zero.partition_parameters:InsertPostInitMethodToModuleSubClasses.patch_init_and_builtins"
)
ENGINE = "diffusion_video:"


# Whether a repair is needed, by its name in `args.without_fixes`, in the order in which they are made.
FIXES: dict[str, Callable[[argparse.Namespace], bool]] = {
    fix.__name__: fix
    for fix in (
        cpu.cpu_training, cpu.no_compiler, weights.resume, weights.load, weights.save, zero3.parallel_layers,
        zero3.zero3_build, evaluation.evaluation, zero3.zero3_sampling, schedule.lr_schedule,
        memory.empty_cache, memory.expandable_segments, optimizer.optimizer_path, sizes.auto_sizes,
        launcher.launcher, peers.timeout, events.events,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Hook:
    """`wrap` is called in place of the function at `target`, a `module:function`, and gets it as first argument. A
    `target` that is a module's import of another module is replaced by what `wrap` makes of that.

    With `fix`, it is part of that repair, and put in place only if the repair is needed and not left out."""

    target: str
    wrap: Callable[..., Any]
    why: str
    fix: str | None = None


def begun(make_loaders: Callable[..., Any], args: argparse.Namespace, *rest: Any, **options: Any) -> Any:
    """The first function that `training_main` calls. Install the table, look at where the run comes from, and show
    the memory that it is predicted to take."""
    install(args)
    report_of(args)
    fill_in_lists(args)  # SAT's own divides by the number of entries in each list
    return make_loaders(args, *rest, **options)


ENTRY = (
    Hook("sys:excepthook", excepthook.in_a_sentence, "a user's mistake ends the run in one sentence"),
    Hook(SAT + "make_loaders", begun, "training_main calls it first, before it counts the lists of data"),
)
# Those around one function in the order in which they are put there: each calls the one above it, and SAT's last.
HOOKS = (
    *ENTRY,
    Hook(SAT + "get_model", zero3.split_while_built, "no rank holds all weights of a network", "zero3_build"),
    Hook(PATCH, zero3.arguments_by_position, "DeepSpeed's wrapper has an argument's name too", "parallel_layers"),
    Hook(SAT + "load_checkpoint", weights.mapped_and_checked, "for SAT's own checkpoints", "load"),
    Hook(SAT + "load_checkpoint", load.load_full, "full checkpoints bypass SAT's load, repaired or not"),
    Hook(SET_UP, optimizer.of_its_path, "innermost: it replaces `initialize`, which SAT calls", "optimizer_path"),
    Hook(SET_UP, load.set_up_resumable, "before an optimizer is made: what trains must be in the checkpoint"),
    Hook(SCHEDULER, schedule.continued, "the rate of SAT's own checkpoints", "lr_schedule"),
    Hook(SCHEDULER, load.with_saved_state, "last before the steps: SAT has read the optimizer's rates as scales"),
    Hook(RATE + "get_lr", schedule.never_negative, "no division by zero, and no rate below it", "lr_schedule"),
    Hook(RATE + "state_dict", schedule.with_warm_up, "a checkpoint must say which steps warm up", "lr_schedule"),
    Hook(SAT + "get_sample_writer", events.or_none, "TensorBoard's file may fail to be made", "events"),
    Hook(SAT + "print_args", events.or_unwritten, "so may the list of arguments", "events"),
    Hook(EVENTS + "write_event", events.until_it_fails, "a full disk must not end the writer's thread", "events"),
    Hook(EVENTS + "flush", events.until_it_fails, "the same", "events"),
    Hook(EVENTS + "close", events.until_it_fails, "the same", "events"),
    Hook(SAT + "train", steps.with_spared_workers, "data workers start here, and must not get SIGTERM"),
    Hook(SAT + "train_step", steps.counted_step, "between steps all ranks agree whether to stop and save"),
    Hook(SAT + "evaluate", evaluation.of_all_samples, "SAT's shows the first rank's losses only", "evaluation"),
    Hook(SAT + "evaluate", zero3.as_first_rank, "its steps sample, whichever `evaluate` it is", "zero3_sampling"),
    Hook(SAT + "evaluate", ema.on_average, "what is evaluated and sampled from, whichever `evaluate` it is"),
    Hook(SAT + "evaluate", steps.untouched, "outermost: restores the random numbers that the others draw"),
    Hook(SAT + "save_checkpoint", weights.whole_weights, "for weights alone: ZeRO-3's from all ranks", "save"),
    Hook(SAT + "save_checkpoint", save.save_sound, "around both kinds: only finite numbers are saved"),
    Hook(SAT + "torch", cpu.without_gpu, "calls to a GPU that is not there", "cpu_training"),
    Hook("sat.training.model_io:torch", cpu.without_gpu, "the same", "cpu_training"),
    Hook("sat.training.utils:torch", cpu.without_gpu, "the same", "cpu_training"),
    Hook("deepspeed.comm.torch:build_shm_op", cpu.never_built, "gloo has what it compiles", "no_compiler"),
    Hook(ENGINE + "torch", memory.emptied_if_full, "CogVideo's engine empties it in every step", "empty_cache"),
    Hook(ENGINE + "gc", memory.collected_seldom, "the same", "empty_cache"),
)

_done: set[str] = set()  # which of `enter` and `install` this process has done: each wraps once


def enter() -> None:
    """Put `ENTRY` in place: SAT's `make_loaders` will install the rest. Safe to call again."""
    if "enter" not in _done:
        put(ENTRY)
        _done.add("enter")


def install(args: argparse.Namespace) -> None:
    """Put the table in place with the repairs that are needed and that `args.without_fixes` does not name. Each
    repair is logged in one line. Safe to call again.

    Raises `ConfigError` for an unknown name, and for what a repair finds that cannot run here."""
    enter()
    left_out = settings_of(args).without_fixes
    reject_unknown_keys(left_out, tuple(FIXES), "args.without_fixes")
    if "install" in _done:
        return
    made = [name for name, fix in FIXES.items() if name not in left_out and fix(args)]
    for name in made:
        print_rank0(f"repaired '{name}' (args.without_fixes leaves it out). Without it: {_symptom(name)}")
    put(hook for hook in HOOKS if hook not in ENTRY and (hook.fix is None or hook.fix in made))
    _done.add("install")


def put(hooks: Iterable[Hook]) -> None:
    """Put hooks in place, those around one function all at once."""
    for target, around in groupby(hooks, lambda hook: hook.target):
        parent, _, name = target.replace(":", ".").rpartition(".")
        owner = resolve_name(parent)
        function = getattr(owner, name)
        for hook in around:
            function = _around(hook.wrap, function) if callable(function) else hook.wrap(function)
        setattr(owner, name, function)


def _around(wrap: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:  # a function and no `partial`, so that it binds as a method
        return wrap(function, *arguments, **options)

    return call


def _symptom(name: str) -> str:
    symptom, _, _ = (FIXES[name].__doc__ or "").partition("\n\n")
    return " ".join(symptom.split()).removeprefix("Symptom: ")


def show() -> None:
    """Print the table, and the repairs that put nothing around a function."""
    table = Table(title="Around SAT's and DeepSpeed's functions, inside out", title_justify="left")
    for column in ("function", "what is around it", "repair", "why there"):
        table.add_column(column, overflow="fold")
    for target, around in groupby(HOOKS, lambda hook: hook.target):
        function = "\nof ".join(reversed(target.split(":")))
        for hook in around:
            file = hook.wrap.__module__.removeprefix("sat_ext.sat.").replace("__main__", "hooks")
            table.add_row(function, f"{file}.{hook.wrap.__name__}", hook.fix or "", hook.why)
            function = ""
        table.add_section()
    for name in FIXES.keys() - {hook.fix for hook in HOOKS}:
        table.add_row("(at the start)", "", name, f"without it: {_symptom(name)}")
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)


if __name__ == "__main__":
    show()
