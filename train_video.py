r"""Train a video diffusion model on images and videos together.

    python train_video.py --base configs/model/tiny.yaml configs/data/demo.yaml configs/zero/zero1.yaml \
        configs/train/demo.yaml
    torchrun --nproc_per_node 2 train_video.py --base ...
    deepspeed train_video.py --base ...

The training loop, the launcher's environment, the learning rate schedule and the checkpoints are SAT's.

Model YAMLs of CogVideo, which name its code, run with a checkout of it:

    export COGVIDEO_SAT=/path/to/CogVideo/sat
    python train_video.py --base $COGVIDEO_SAT/configs/cogvideox_5b.yaml $COGVIDEO_SAT/configs/sft.yaml \
        configs/cogvideo/joint.yaml

That is the checkout's own train_video.py, run from here: its engine, its steps and its arguments, so that both
commands train alike. Ours would only be a second version of them.
"""

from __future__ import annotations

import sys
from functools import partial

from sat_ext.cogvideo.script import is_for_script, run_script
from sat_ext.sat.excepthook import sentence_of


def main() -> None:
    """Read the YAML, let SAT train, write the held-out losses."""
    # imported here: CogVideo's script needs none of it
    from sat.training.deepspeed_training import training_main

    from sat_ext.models.engine import VideoDiffusionEngine
    from sat_ext.sat import hooks
    from sat_ext.sat.arguments import initialize, parse_args
    from sat_ext.sat.training import TrainingHooks, get_target

    args = parse_args()
    hooks.install(args)
    initialize(args)
    data_class = get_target(args.data_config["target"])
    ours = TrainingHooks(args)
    training_main(
        args,
        model_cls=VideoDiffusionEngine,
        forward_step_function=ours.forward_step,
        forward_step_eval=ours.forward_step_eval,
        handle_metrics_function=ours.handle_metrics,
        create_dataset_function=partial(
            data_class.create_dataset_function, **(args.data_config.get("params") or {})
        ),
    )
    ours.write_result()


if __name__ == "__main__":
    try:
        run_script() if is_for_script(sys.argv[1:]) else main()
    except KeyboardInterrupt:
        sys.exit(130)  # as the shell has it: 128 + SIGINT
    except Exception as error:  # here: torch.distributed's excepthook would put the rank before the sentence
        if sentence := sentence_of(error):
            sys.exit(f"error: {sentence}")
        raise
