r"""Train a video diffusion model on images and videos together.

    python train_video.py --base configs/model/tiny.yaml configs/data/demo.yaml configs/zero/zero1.yaml \
        configs/train/demo.yaml
    torchrun --nproc_per_node 2 train_video.py --base ...
    deepspeed train_video.py --base ...

The training loop, the launcher's environment, the learning rate schedule and the checkpoints are SAT's.
"""

from __future__ import annotations

import sys
from functools import partial

from sat.training.deepspeed_training import training_main

from sat_ext.errors import SatExtError
from sat_ext.models.engine import VideoDiffusionEngine
from sat_ext.sat import fixes
from sat_ext.sat.arguments import initialize, parse_args
from sat_ext.sat.training import TrainingHooks, get_target, sentence_of


def main() -> None:
    """Read the YAML, let SAT train, write the held-out losses."""
    args = parse_args()
    fixes.apply()
    initialize(args)
    data_class = get_target(args.data_config["target"])
    hooks = TrainingHooks(args)
    training_main(
        args,
        model_cls=VideoDiffusionEngine,
        forward_step_function=hooks.forward_step,
        forward_step_eval=hooks.forward_step_eval,
        handle_metrics_function=hooks.handle_metrics,
        create_dataset_function=partial(
            data_class.create_dataset_function, **(args.data_config.get("params") or {})
        ),
    )
    hooks.write_result()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # as the shell has it: 128 + SIGINT
    except (SatExtError, RuntimeError) as error:
        sys.exit(f"error: {sentence_of(error)}")
