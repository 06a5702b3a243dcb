"""The joint loss against CogVideo's own loss, denoiser, samplers of noise levels, and networks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

import in_checkout
import tiny
import torch
from in_checkout import Skip
from omegaconf import OmegaConf
from torch import Tensor

from sat_ext.config import read_yaml

HEIGHT, WIDTH = tiny.SIZE[0] // 8, tiny.SIZE[1] // 8
OURS = "sat_ext.cogvideo.JointDiffusionLoss"
LORA = {"lora_config": {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 128}}}


class Model:
    """The tiny network, denoiser and loss of a configuration, without first stage and text encoder."""

    def __init__(self, sat: Path, name: str, modules: dict[str, Any] | None = None) -> None:
        from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
        from sgm.util import instantiate_from_config

        self.config = OmegaConf.create(tiny.model(sat, name, Path("nowhere"))["model"])
        self.config.network_config.params.modules.update(modules or {})
        torch.manual_seed(0)
        self.network = OpenAIWrapper(instantiate_from_config(self.config.network_config))
        for parameter in self.network.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        self.denoiser = instantiate_from_config(self.config.denoiser_config)
        self.i2v = bool(self.config.get("noised_image_input"))
        self.embeds_ofs = getattr(self.network.diffusion_model, "ofs_embed_dim", None) is not None

    def loss(self, *, ours: bool = True, **params: Any) -> Any:
        from sgm.util import instantiate_from_config

        config = OmegaConf.create(OmegaConf.to_container(self.config.loss_fn_config))
        if ours:  # as an overlay does: another target, and more parameters beside the parent's
            config.target = OURS
        config.params.update(params)
        return instantiate_from_config(config)

    def batch(self, kinds: list[str], frames: int) -> dict[str, Any]:
        torch.manual_seed(7)
        batch: dict[str, Any] = {"kind": kinds, "txt": ["a"] * len(kinds)}
        if self.i2v:
            first = torch.randn(len(kinds), frames, 16, HEIGHT, WIDTH)
            first[:, 1:] = 0
            batch["concat_images"] = first.requires_grad_()
        return batch

    def run(self, loss: Any, batch: dict[str, Any], frames: int) -> tuple[Tensor, list[Tensor]]:
        """Losses (B,), and everything that a step leaves behind: gradients and the random state."""
        self.network.zero_grad()
        torch.manual_seed(11)
        latents = torch.randn(len(batch["kind"]), frames, 16, HEIGHT, WIDTH)
        text = torch.randn(len(latents), tiny.TEXT_LENGTH, tiny.TEXT_HIDDEN)
        losses: Tensor = loss(self.network, self.run_denoiser, lambda _: {"crossattn": text}, latents, batch)
        losses.mean().backward()
        left = [p.grad.clone() for p in self.network.parameters() if p.grad is not None]
        assert left and all(g.isfinite().all() for g in [losses, *left])
        return losses, [*left, torch.get_rng_state()]

    def run_denoiser(self, *args: Any, **kwargs: Any) -> Tensor:
        self.levels, self.given, self.output = args[2], kwargs, self.denoiser(*args, **kwargs)
        self.output.retain_grad()
        output: Tensor = self.output
        return output


def models(sat: Path) -> list[Model]:
    return [Model(sat, n) for n in tiny.model_names(sat) if "lora" not in n]


def image_to_video(sat: Path) -> Model:
    return next(m for m in models(sat) if m.i2v)


def check_clips_without_options_give_the_parents_numbers_gradients_and_draws(sat: Path) -> None:
    for model in models(sat):
        for frames in (2, 4):
            batch = model.batch(["video"] * 3, frames) | {"loss_weight": torch.ones(3)}
            theirs = batch
            more = {}
            if model.embeds_ofs:  # the parent has to be told
                theirs, more = batch | {"ofs": torch.full((3,), 2.0)}, {"batch2model_keys": ["ofs"]}
            first, left = model.run(model.loss(ours=False, **more), theirs, frames)
            second, same = model.run(model.loss(), batch, frames)
            assert torch.equal(first, second)
            assert len(left) == len(same) and all(torch.equal(a, b) for a, b in zip(left, same))


def check_noise_levels_lie_where_the_stream_put_the_samples(sat: Path) -> None:
    for model in models(sat):
        sampler = OmegaConf.to_container(model.config.loss_fn_config.params.sigma_sampler_config)
        stratified = {**sampler, "target": "sat_ext.cogvideo.StratifiedSampling"}
        batch = model.batch(["video"] * 4, 4)
        _, left = model.run(model.loss(), batch, 4)
        drawn = model.given["idx"].tolist()
        loss = model.loss(sigma_sampler_config=stratified)
        losses, _ = model.run(loss, batch | {"timestep": torch.tensor([0.0, 0.25, 0.5004, 0.99999999])}, 4)
        assert model.given["idx"].tolist() == [0, 250, 500, 999]
        levels = loss.sigma_sampler.idx_to_sigma(torch.tensor([0, 250, 500, 999]))
        assert torch.equal(model.levels.flatten(), levels)
        assert losses.unique().numel() == 4
        # an evaluation has no places: as before, also in the random numbers
        _, again = model.run(loss, batch, 4)
        assert model.given["idx"].tolist() == drawn
        assert all(torch.equal(a, b) for a, b in zip(left, again, strict=True))


def check_the_parent_alone_has_the_faults_that_are_mended(sat: Path) -> None:
    model = image_to_video(sat)
    if model.embeds_ofs:
        for frames, batch in ((4, model.batch(["video"], 4)), (3, model.batch(["video"], 3))):
            try:
                model.run(model.loss(ours=False), batch, frames)
            except Exception:
                continue
            raise AssertionError("the parent trains 1.5's I2V model by itself")
    else:
        batch = model.batch(["image"], 1)
        model.run(model.loss(ours=False), batch, 1)
        assert batch["concat_images"].grad.any(), "the parent does not show a still its target"


def check_stills_do_not_see_their_target(sat: Path) -> None:
    model = image_to_video(sat)
    loss = model.loss()
    for kinds, frames in ((["image"] * 2, 1), (["image", "video"], 4)):
        batch = model.batch(kinds, frames)
        losses, _ = model.run(loss, batch, frames)
        output, gradient = model.output.detach(), batch["concat_images"].grad
        assert gradient is None or not gradient[0].any()
        other = batch | {"concat_images": batch["concat_images"].detach() * 3 + 1}
        again, _ = model.run(loss, other, frames)
        assert torch.equal(losses[0], again[0]) and torch.equal(output[0], model.output[0])
        if kinds[1] == "video":
            assert gradient[1].any() and not torch.equal(output[1], model.output[1])


def check_1_5_trains_on_stills_and_odd_clips_with_no_loss_on_the_padding(sat: Path) -> None:
    if "1.5" not in tiny.model_names(sat)[0]:
        raise Skip("patches of 1.0 are of one frame")
    for model in models(sat):
        for kinds, frames in ((["image"] * 2, 1), (["video"] * 2, 3)):
            loss, batch = model.loss(), model.batch(kinds, frames)
            losses, left = model.run(loss, batch, frames)
            assert model.output.shape[1] == frames + 1
            assert not model.output.grad[:, 0].any() and (model.output.grad[:, 1:] != 0).any(dim=(2, 3, 4)).all()
            torch.manual_seed(11)
            latents = torch.randn(2, frames, 16, HEIGHT, WIDTH)
            signal = loss.sigma_sampler.idx_to_sigma(model.given["idx"])
            error = (model.output[:, 1:] - latents).square().flatten(1).mean(1) / (1 - signal**2)
            torch.testing.assert_close(losses, error.float(), rtol=1e-5, atol=1e-6)
            if model.embeds_ofs:
                assert model.given["ofs"].tolist() == [2.0, 2.0]
            assert len(left) > 20


def check_1_0_trains_on_stills(sat: Path) -> None:
    if "1.5" in tiny.model_names(sat)[0]:
        raise Skip("1.5 pads them")
    for model in models(sat):
        model.run(model.loss(), model.batch(["image"] * 2, 1), 1)


def check_the_condition_is_at_the_scale_of_the_sampler(sat: Path) -> None:
    """What the engine's `shared_step` hands to the loss, beside what sample_video.py hands to the sampler."""
    from types import MethodType, SimpleNamespace

    from diffusion_video import SATVideoDiffusionEngine as Engine

    new = "1.5" in tiny.model_names(sat)[0]
    model, handed = image_to_video(sat), []

    class Stage(SimpleNamespace):
        def __call__(self, x: Tensor, batch: dict[str, Any]) -> tuple[None, None]:
            def denoise(network: Any, noisy: Tensor, levels: Tensor, cond: dict[str, Tensor], **_: Any) -> Tensor:
                handed.append(cond["concat"])
                return noisy

            for scale in (None, 1.0, 1 / 0.7):
                model.loss(condition_scale=scale)(model.network, denoise, lambda _: {}, x, dict(batch))
            return None, None

    engine = Stage(
        lr_scale=None, noised_image_input=True, noised_image_all_concat=False, noised_image_dropout=0.0,
        latent_input=False, en_and_decode_n_samples_a_time=None, disable_first_stage_autocast=True,
        scale_factor=0.7, input_key="mp4", dtype=torch.float32, add_noise_to_first_frame=lambda image: image,
        first_stage_model=SimpleNamespace(encode=lambda x: x),
    )  # fmt: skip
    for name in ("get_input", "encode_first_stage"):
        setattr(engine, name, MethodType(getattr(Engine, name), engine))
    pixels = torch.randn(1, 4, 16, HEIGHT, WIDTH)
    Engine.shared_step(engine, {"mp4": pixels, "kind": ["video"]})
    latent = pixels[:, :1]
    plain, unscaled, inverted = (c[:, :1] for c in handed)
    torch.testing.assert_close(plain, 0.7 * latent)
    torch.testing.assert_close(unscaled, latent)
    torch.testing.assert_close(inverted, latent / 0.7)
    sampled = engine.encode_first_stage(latent.transpose(1, 2), None).transpose(1, 2)
    script = (sat / "sample_video.py").read_text()
    assert ("image = image / model.scale_factor" in script) == new
    if new:
        sampled = sampled / engine.scale_factor
    torch.testing.assert_close(unscaled if new else plain, sampled)


def check_an_evaluation_decodes_every_frame_that_it_sampled(sat: Path) -> None:
    from types import SimpleNamespace

    from diffusion_video import SATVideoDiffusionEngine as Engine

    if "1.5" not in tiny.model_names(sat)[0]:
        raise Skip("the tag v1.0 decodes all")
    decoder = SimpleNamespace(decode=lambda z, **_: z)
    engine: Any = SimpleNamespace(scale_factor=1.0, en_and_decode_n_samples_a_time=None, first_stage_model=decoder)
    from sat_ext.cogvideo import PaddedSampler

    sampler: Any = PaddedSampler(parent=f"{__name__}.Noise")
    for frames in (4, 5):
        x = torch.randn(1, frames, 16, 2, 2)
        decoded = Engine.decode_first_stage(engine, sampler(None, x, {}).transpose(1, 2))
        torch.testing.assert_close(decoded.transpose(1, 2), x)


def check_a_lora_learns_at_the_rate_of_the_overlays_and_not_at_the_one_for_full_tuning(sat: Path) -> None:
    """SAT's LoRA at its real rank on one batch, with the optimizer's settings of the documented commands."""
    name, overlay = ("cogvideox_2b_lora", "lora-rate")
    if "1.5" in tiny.model_names(sat)[0]:
        name, overlay = ("cogvideox1.5_5b", "lora")
    theirs = [str(sat / "configs" / f"{n}.yaml") for n in (name, "sft")]
    ours = [str(Path(__file__).parents[2] / "configs" / "cogvideo" / f"{n}.yaml") for n in ("joint", overlay)]
    falls = []
    for files in ([*theirs, ours[0]], [*theirs, *ours]):
        params = read_yaml(files)["deepspeed"]["optimizer"]["params"]
        model = Model(sat, name, LORA)
        adapters = [p for n, p in model.network.named_parameters() if "matrix_" in n]
        for part, parameter in model.network.named_parameters():
            if "matrix_B" in part:
                torch.nn.init.zeros_(parameter)  # as it begins
            elif "matrix_A" in part:
                torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
        optimizer = torch.optim.AdamW(
            adapters, lr=params["lr"], betas=tuple(params["betas"]), eps=float(params["eps"]),
            weight_decay=params["weight_decay"],
        )  # fmt: skip
        loss, batch, found = model.loss(), model.batch(["video"] * 2, 2), []
        for _ in range(100):
            losses, _ = model.run(loss, batch, 2)
            optimizer.step()
            found.append(float(losses.mean()))
        falls.append(1 - found[-1] / found[0])
    before, after = falls
    assert 20 * abs(before) < 0.004 < after, falls  # shares of the loss, after 100 steps


def check_a_dropped_caption_is_what_the_sampler_guides_against(sat: Path) -> None:
    """Embeddings of zeros, both: sample_video.py asks for them, and `ucg_rate` gives them in training."""
    from sgm.modules import GeneralConditioner

    assert 'force_uc_zero_embeddings = ["txt"]' in (sat / "sample_video.py").read_text()
    entry = {"target": f"{__name__}.Embedder", "params": {}, "input_key": "txt", "ucg_rate": 1.0}
    conditioner = GeneralConditioner([OmegaConf.create(entry)])
    batch = {"txt": ["a", "b"]}
    dropped = conditioner(batch)["crossattn"]
    entry["ucg_rate"] = 0.1
    shown, guided = GeneralConditioner([OmegaConf.create(entry)]).get_unconditional_conditioning(
        batch, force_uc_zero_embeddings=["txt"]
    )
    assert torch.equal(dropped, guided["crossattn"]) and not dropped.any() and shown["crossattn"].any()
    # for diffusers, which guides against the embedding of ""
    empty = GeneralConditioner([OmegaConf.create({**entry, "ucg_rate": 1.0, "legacy_ucg_value": ""})])
    assert torch.equal(empty({"txt": ["a", "b"]})["crossattn"], Embedder()(["", ""]))


def Embedder() -> Any:
    """Of captions, by their length: a text encoder for CogVideo's conditioner."""
    from sgm.modules.encoders.modules import AbstractEmbModel

    class ByLength(AbstractEmbModel):  # type: ignore[misc]
        def forward(self, text: list[str]) -> Tensor:
            return torch.stack([torch.full((3, 4), 1.0 + len(t)) for t in text])

    return ByLength()


class Noise:
    """A sampler that gives its noise back."""

    def __call__(self, denoiser: Any, x: Tensor, cond: Any, uc: Any = None, ofs: Any = None) -> Tensor:
        return x


def check_noise_levels_are_split_over_any_number_of_ranks(sat: Path) -> None:
    from sat import mpu

    model = image_to_video(sat)
    params = model.config.loss_fn_config.params.sigma_sampler_config.params
    assert params.uniform_sampling and params.num_idx == 1000
    before = mpu.get_data_parallel_world_size, mpu.get_data_parallel_rank
    try:
        for world in (9, 12, 16, 24, 40, 48):
            mpu.get_data_parallel_world_size = lambda world=world: world
            sampler = model.loss().sigma_sampler
            assert sampler.group_width * sampler.group_num == world
            covered: set[int] = set()
            for rank in range(world):
                mpu.get_data_parallel_rank = lambda rank=rank: rank
                levels = sampler(4000, return_idx=True)[1]
                assert int(levels.max() - levels.min()) < sampler.sigma_interval
                covered |= set(levels.tolist())
            assert len(covered) > 990
            try:
                model.loss(ours=False)
            except AssertionError:
                assert world % 40
            else:
                assert world % 40 == 0 or "group_num" not in params
    finally:
        mpu.get_data_parallel_world_size, mpu.get_data_parallel_rank = before


def check_metrics_and_weights_go_by_kind(sat: Path) -> None:
    for model in models(sat):
        batch, weight = model.batch(["image", "video", "image"], 4), torch.tensor([2.0, 3.0, 4.0])
        plain, _ = model.run(model.loss(), batch, 4)
        loss = model.loss(loss_weights={"image": 0.5, "video": 2.0})
        losses, _ = model.run(loss, batch | {"loss_weight": weight}, 4)
        torch.testing.assert_close(losses, plain * weight * torch.tensor([0.5, 2.0, 0.5]))
        torch.testing.assert_close(loss.metrics()["loss_image"], plain[[0, 2]].mean().detach())
        torch.testing.assert_close(loss.metrics()["loss_video"], plain[1].detach())


def check_ranks_that_share_a_model_weigh_and_drop_alike(sat: Path) -> None:
    """Two processes with a group of two, of which the second gets no `kind` and no `loss_weight`."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(sat), "pair"],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    told = [rank.communicate(timeout=900) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told[0][1][-2000:] + told[1][1][-2000:]
    first, second = (out.splitlines()[-1] for out, _ in told)
    assert first == second and "True" in first and "False" in first


def pair(sat: Path) -> None:
    """What a rank of the check above does: print the losses, and whose condition was dropped."""
    from sat import mpu
    from sat.arguments import initialize_distributed

    rank, kinds = int(os.environ["RANK"]), ["image", "video", "video", "video"]
    initialize_distributed(
        OmegaConf.create(
            {"distributed_backend": "gloo", "model_parallel_size": 2, "rank": rank, "local_rank": rank,
             "world_size": 2, "deepspeed": False, "device": "cpu", "mode": "pretrain",
             "checkpoint_activations": False, "master_ip": "127.0.0.1", "master_port": os.environ["MASTER_PORT"]}
        )
    )  # fmt: skip
    assert mpu.get_model_parallel_world_size() == 2
    from sgm.util import instantiate_from_config

    name = next(n for n in tiny.model_names(sat) if "i2v" in n)
    config = OmegaConf.create(tiny.model(sat, name, Path("nowhere"))["model"]["loss_fn_config"])
    config.target = OURS
    config.params.update(loss_weights={"image": 0.5}, condition_dropout=0.5)
    seen: dict[str, Tensor] = {}

    def denoise(network: Any, noisy: Tensor, levels: Tensor, cond: dict[str, Tensor], **inputs: Any) -> Tensor:
        seen["condition"] = cond["concat"]
        return noisy

    torch.manual_seed(5 + rank)
    batch: dict[str, Any] = {"concat_images": torch.ones(4, 2, 16, 2, 2), "num_frames": torch.full((4,), 9)}
    if rank == 0:
        batch |= {"kind": kinds, "loss_weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    loss = instantiate_from_config(config)
    losses = loss(torch.nn.Identity(), denoise, lambda _: {}, torch.ones(4, 2, 16, 2, 2), batch)
    dropped = (~seen["condition"].flatten(1).any(dim=1)).tolist()
    print("\n", losses.tolist(), dropped, {k: float(v) for k, v in loss.metrics().items()})


test_original = in_checkout.test_of(__file__)

if __name__ == "__main__":
    if sys.argv[2:] == ["pair"]:
        import on_cpu

        pair(on_cpu.prepare(sys.argv[1]))
    else:
        in_checkout.main(globals())
