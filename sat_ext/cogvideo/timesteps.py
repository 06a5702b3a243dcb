"""CogVideo's draws of noise levels, spread evenly over the samples of an update."""

from typing import Any

from torch import Tensor

from sat_ext.cogvideo.target import Target


class StratifiedSampling(Target):
    """A target for `sigma_sampler_config`: the class `parent`, with levels where the stream has put the samples.

    `JointDiffusionLoss` sets `places`, the batch's `timestep` (B,), before it asks for levels. Without them, in an
    evaluation or for another data class, the parent draws. Its `uniform_sampling`, which gives each rank a part of
    the range, is the special case of one sample a rank."""

    PARENT = "sgm.modules.diffusionmodules.sigma_sampling.DiscreteSampling"
    WHERE = "model.loss_fn_config.params.sigma_sampler_config.params"
    num_idx: int
    places: Tensor | None = None

    def __call__(self, n_samples: int, rand: Tensor | None = None, return_idx: bool = False) -> Any:
        """Noise levels (B,), and with `return_idx` their numbers."""
        if self.places is not None:
            rand = (self.places.cpu() * self.num_idx).long().clamp(max=self.num_idx - 1)
            self.places = None
        parent: Any = super().__call__  # type: ignore[misc]
        return parent(n_samples, rand, return_idx)
