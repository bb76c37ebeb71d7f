"""Losses against their formulas, written again in float64 from the papers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from reslora_diffusion.diffusion.data.sampling import Batch
from reslora_diffusion.diffusion.models.families import Texts
from reslora_diffusion.diffusion.objective.loss import Objective
from reslora_diffusion.diffusion.objective.noise import Diffusion, FlowMatching

TIMESTEPS = (0, 3, 250, 700, 999)


def make_process(prediction_type="epsilon", zero_snr=False) -> Diffusion:
    return Diffusion(
        DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            rescale_betas_zero_snr=zero_snr,
        )
    )


def make_batch(masks=None) -> Batch:
    source = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, len(TIMESTEPS), 3, 4, 6, generator=source)
    return Batch(
        latents=latents,
        noise=noise,
        timesteps=torch.tensor(TIMESTEPS),
        texts=Texts(torch.zeros(1, 1, 1)),
        prompt_index=torch.zeros(len(TIMESTEPS), dtype=torch.long),
        weights=torch.ones(len(TIMESTEPS)),
        time_ids=torch.zeros(len(TIMESTEPS), 6),
        masks=masks,
    )


def alpha_bars(zero_snr: bool) -> np.ndarray:
    """Scaled-linear schedule; with zero terminal SNR as in arXiv 2305.08891, algorithm 1."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    if zero_snr:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root[list(TIMESTEPS)] ** 2


def reference(prediction: torch.Tensor, batch: Batch, kind: str, zero_snr: bool, rho, weight) -> np.ndarray:
    x0, eps, out = (value.double().numpy() for value in (batch.latents, batch.noise, prediction))
    losses = []
    for n, alpha_bar in enumerate(alpha_bars(zero_snr)):
        target = eps[n] if kind == "epsilon" else math.sqrt(alpha_bar) * eps[n] - math.sqrt(1 - alpha_bar) * x0[n]
        mask = 1.0 if batch.masks is None else np.broadcast_to(batch.masks[n].double().numpy(), x0[n].shape)
        mean = np.average(rho(out[n] - target, alpha_bar, TIMESTEPS[n]), weights=np.broadcast_to(mask, x0[n].shape))
        losses.append(weight(alpha_bar) * mean)
    return np.array(losses)


def squared(error, alpha_bar, t):
    return error**2


def ratio(alpha_bar):
    return alpha_bar / (1 - alpha_bar)


WEIGHTS = {
    ("epsilon", "snr_gamma"): lambda a: min(ratio(a), 5.0) / ratio(a),
    ("v_prediction", "snr_gamma"): lambda a: min(ratio(a), 5.0) / (ratio(a) + 1),
    ("epsilon", "debiased_estimation_loss"): lambda a: 1 / math.sqrt(min(ratio(a), 1000)),
    ("v_prediction", "debiased_estimation_loss"): lambda a: 1 / (min(ratio(a), 1000) + 1),
    ("v_prediction", "scale_v_pred_loss_like_noise_pred"): lambda a: min(ratio(a), 1000) / (min(ratio(a), 1000) + 1),
    ("epsilon", "v_pred_like_loss"): lambda a: 1 + 0.7 * (min(ratio(a), 1000) + 1) / min(ratio(a), 1000),
}
GIVEN = {"snr_gamma": 5.0, "v_pred_like_loss": 0.7}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_plain_loss(kind, zero_snr):
    batch, prediction = make_batch(), torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    losses = Objective().losses(prediction, batch, make_process(kind, zero_snr))
    expected = reference(prediction, batch, kind, zero_snr, squared, lambda a: 1.0)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(("kind", "name"), WEIGHTS)
def test_weightings(kind, name):
    batch, prediction = make_batch(), torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    objective = Objective(**{name: GIVEN.get(name, True)})
    losses = objective.losses(prediction, batch, make_process(kind))
    expected = reference(prediction, batch, kind, False, squared, WEIGHTS[kind, name])
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-4)


def test_weightings_stay_finite_where_nothing_but_noise_is_left():
    batch = make_batch()
    for kind, gamma, debiased in [
        ("epsilon", 5.0, False),
        ("v_prediction", 5.0, False),
        ("epsilon", None, True),
        ("v_prediction", None, True),
    ]:
        process = make_process(kind, zero_snr=True)
        losses = Objective(snr_gamma=gamma, debiased_estimation_loss=debiased).losses(batch.noise * 2, batch, process)
        assert losses.isfinite().all()
        of_kind = {"v_pred_like_loss": 1.0} if kind == "epsilon" else {"scale_v_pred_loss_like_noise_pred": True}
        assert Objective(**of_kind).losses(batch.noise * 2, batch, process).isfinite().all()
    assert make_process(zero_snr=True).snr(torch.tensor([999])) == 0


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_robust_losses(loss_type, schedule, scale):
    batch, prediction = make_batch(), 3 * torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(1))

    def c_of(alpha_bar, t):
        if schedule == "exponential":
            return math.exp(-(-math.log(0.1) / 1000) * t) * scale
        sigma = math.sqrt((1 - alpha_bar) / alpha_bar)
        return 0.1 * scale if schedule == "constant" else (1 - 0.1) / (1 + sigma) ** 2 + 0.1

    def rho(error, alpha_bar, t):
        c = c_of(alpha_bar, t)
        return 2 * (c if loss_type == "huber" else 1) * (np.sqrt(error**2 + c**2) - c)

    objective = Objective(loss_type=loss_type, huber_schedule=schedule, huber_scale=scale)
    losses = objective.losses(prediction, batch, make_process())
    expected = reference(prediction, batch, "epsilon", False, rho, lambda a: 1.0)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-3)


def test_the_loss_of_absolute_errors():
    batch, prediction = make_batch(), torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    losses = Objective(loss_type="l1").losses(prediction, batch, make_process())
    expected = reference(prediction, batch, "epsilon", False, lambda error, a, t: abs(error), lambda a: 1.0)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


def test_a_masked_loss_over_the_image_is_kohyas():
    """`apply_masked_loss` multiplies by the mask, and the mean is over all of the image."""
    masks = torch.rand(5, 1, 4, 6, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    batch, prediction = make_batch(masks), torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    losses = Objective(masked_mean="image").losses(prediction, batch, make_process())
    error = prediction.double() - batch.noise.double()
    np.testing.assert_allclose(losses.numpy(), (error**2 * masks.double()).mean((1, 2, 3)).numpy(), rtol=1e-5)
    assert not torch.allclose(losses, Objective().losses(prediction, batch, make_process()))


def test_a_masked_loss_is_the_mean_over_the_mask():
    masks = torch.rand(5, 1, 4, 6, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    batch, prediction = make_batch(masks), torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    losses = Objective().losses(prediction, batch, make_process())
    expected = reference(prediction, batch, "epsilon", False, squared, lambda a: 1.0)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)
    outside = prediction + 100 * (masks == 0)
    torch.testing.assert_close(Objective().losses(outside, batch, make_process()), losses)
    nothing = Objective().losses(prediction, make_batch(torch.zeros(5, 1, 4, 6)), make_process())
    assert nothing.eq(0).all()


def test_the_target_is_what_a_perfect_model_predicts():
    batch = make_batch()
    velocity = make_process("v_prediction")
    target = velocity.scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    assert Objective().losses(target, batch, velocity).eq(0).all()
    assert Objective().losses(batch.noise, batch, make_process()).eq(0).all()
    assert Objective().losses(batch.noise - batch.latents, batch, make_flow()).eq(0).all()


def make_flow(**settings) -> FlowMatching:
    return FlowMatching(FlowMatchEulerDiscreteScheduler(shift=3.0), **settings)


def shifted_sigmas() -> np.ndarray:
    """Noise levels of Stable Diffusion 3 (arXiv 2403.03206, eq. 23), from noise to data."""
    plain = np.linspace(1000, 1, 1000)[list(TIMESTEPS)] / 1000
    return 3 * plain / (1 + 2 * plain)


def test_a_flow_leads_straight_from_the_latents_to_noise():
    batch, flow = make_batch(), make_flow()
    sigmas = shifted_sigmas()
    np.testing.assert_allclose(flow.times(batch.timesteps).numpy(), 1000 * sigmas, rtol=1e-5)
    np.testing.assert_allclose(flow.snr(batch.timesteps).numpy(), ((1 - sigmas) / sigmas) ** 2, rtol=1e-3, atol=1e-10)
    x0, eps = batch.latents.double().numpy(), batch.noise.double().numpy()
    expected = np.stack([(1 - s) * a + s * b for s, a, b in zip(sigmas, x0, eps, strict=True)])
    np.testing.assert_allclose(
        flow.add_noise(batch.latents, batch.noise, batch.timesteps).numpy(), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("precondition", [True, False])
def test_losses_of_a_flow(scheme, precondition):
    """With preconditioned outputs, the loss is of the clean latents that the prediction implies."""
    batch, prediction = make_batch(), torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    losses = Objective().losses(
        prediction, batch, make_flow(weighting_scheme=scheme, precondition_outputs=precondition)
    )
    x0, eps, out = (value.double().numpy() for value in (batch.latents, batch.noise, prediction))
    expected = []
    for n, s in enumerate(shifted_sigmas()):
        noisy = (1 - s) * x0[n] + s * eps[n]
        error = (noisy - s * out[n]) - x0[n] if precondition else out[n] - (eps[n] - x0[n])
        weight = {"sigma_sqrt": s**-2, "cosmap": 2 / (math.pi * (1 - 2 * s + 2 * s * s))}.get(scheme, 1.0)
        expected.append(weight * np.mean(error**2))
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-4)


def test_timesteps_of_a_flow_are_drawn_by_its_weighting_scheme():
    def draws(**settings) -> np.ndarray:
        source, flow = torch.Generator().manual_seed(0), make_flow(**settings)
        return np.array([flow.draw(source) for _ in range(4000)]) / 1000

    plain, late, even = draws(), draws(logit_mean=1.0, logit_std=0.5), draws(weighting_scheme="cosmap")
    logit = np.log(plain / (1 - plain))
    np.testing.assert_allclose([logit.mean(), logit.std()], [0, 1], atol=0.05)
    assert np.median(late) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.02)
    np.testing.assert_allclose(np.quantile(even, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03)
    assert draws(weighting_scheme="mode").max() < 1
