"""Options on the objective, the optimizer and the length of a run."""

from dataclasses import dataclass
from typing import NamedTuple

from ...methods.pair_optimizers import PAIR_OPTIMIZERS
from ...utils.options import option
from .model import FLUX, FROZEN_TEXT, SD3, XL


class Packaged(NamedTuple):
    """An optimizer of a package that need not be installed: the module and class, and what pip calls the package."""

    module: str
    name: str
    package: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


BITSANDBYTES = {
    "adam8bit": "Adam8bit",
    "adamw8bit": "AdamW8bit",
    "pagedadamw": "PagedAdamW",
    "pagedadamw8bit": "PagedAdamW8bit",
    "lion8bit": "Lion8bit",
    "pagedlion8bit": "PagedLion8bit",
    "sgdnesterov8bit": "SGD8bit",
}
# By name, as in kohya's scripts. `dadaptation` is one of several there, of which this is the usual one.
PACKAGED: dict[str, Packaged] = {
    **{name: Packaged("bitsandbytes.optim", kind, "bitsandbytes") for name, kind in BITSANDBYTES.items()},
    "lion": Packaged("lion_pytorch", "Lion", "lion-pytorch"),
    "came": Packaged("came_pytorch", "CAME", "came-pytorch"),
    "prodigy": Packaged("prodigyopt", "Prodigy", "prodigyopt"),
    **{
        f"{name.lower()}schedulefree": Packaged("schedulefree", f"{name}ScheduleFree", "schedulefree")
        for name in ("AdamW", "RAdam", "SGD")
    },
    **{
        f"dadapt{name.lower()}": Packaged("dadaptation", f"DAdapt{name}", "dadaptation")
        for name in ("AdaGrad", "Adam", "Adan", "Lion")
    },
    "dadaptation": Packaged("dadaptation", "DAdaptAdam", "dadaptation"),
}
# They find one learning rate for all parameters; what is given is a factor on it, and 1 is usual.
ONE_RATE = {"prodigy", *(name for name in PACKAGED if name.startswith("dadapt"))}
OPTIMIZERS = (
    *PAIR_OPTIMIZERS,
    *("adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "asgd", "muon", "nadam"),
    *("radam", "rmsprop", "rprop", "sgd", "sgdnesterov"),
    *sorted(PACKAGED),
)
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
TIMESTEP_SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
WEIGHTINGS = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
NEWER = (XL, SD3, FLUX, *FROZEN_TEXT)  # families whose scripts in diffusers share their defaults


@dataclass
class TrainingOptions:
    """Training."""

    preset: str | None = option(
        None,
        "Settings that others have published for a kind of subject, where they are not given (docs/recipes.md).",
        choices=("object", "person", "style"),
    )
    train_batch_size: int = option(
        4, "Images in a batch of each process; as many class images join them.", at_least=1, binds=True, in_header=True
    )
    gradient_accumulation_steps: int = option(
        1, "Batches that make one optimizer step.", at_least=1, binds=True, in_header=True
    )
    num_train_epochs: int = option(1, "Passes over the data.", at_least=1, kohya={"max_train_epochs": ""})
    max_train_steps: int | None = option(None, "Optimizer steps; overrides --num_train_epochs.", at_least=1)
    seed: int | None = option(
        None, "Seed of all random numbers (default: one is drawn and recorded).", at_least=0, binds=True
    )
    learning_rate: float = option(
        5e-4,
        "Learning rate of the UNet or transformer.",
        above=0,
        in_header=True,
        families=dict.fromkeys(NEWER, 1e-4),
        kohya={"unet_lr": ""},
    )
    text_encoder_lr: float | None = option(
        None,
        "Learning rate of the text encoders (default: Stable Diffusion 1.x and 2.x --learning_rate).",
        above=0,
        in_header=True,
        families=dict.fromkeys(NEWER, 5e-6),
    )
    loraplus_lr_ratio: float | None = option(
        None, "Factor on the learning rate of lora_B (LoRA+); 16 is usual.", above=0
    )
    scale_lr: bool = option(False, "Multiply the learning rate by batch size, accumulation and number of processes.")
    lr_scheduler: str = option("constant", "Schedule of the learning rate.", choices=SCHEDULES, in_header=True)
    lr_warmup_steps: int | float = option(
        500, "Steps in which the schedules that warm up do so; below 1 a share of all steps.", at_least=0
    )
    lr_num_cycles: int = option(1, "Cycles of cosine_with_restarts.", at_least=1, kohya={"lr_scheduler_num_cycles": ""})
    lr_power: float = option(1.0, "Power of polynomial.", above=0, kohya={"lr_scheduler_power": ""})
    optimizer: str = option(
        "adamw",
        "Optimizer, or the import path of a class such as torch.optim.AdamW. rite, pro, scaled_adamw and reflora are "
        "of docs/methods.md, adafactor is of transformers, and the last ones are of packages that are to be installed.",
        choices=OPTIMIZERS,
        import_path=True,
        lower=True,
        binds=True,
        in_header=True,
        kohya={"optimizer_type": ""},
    )
    optimizer_args: dict[str, str] = option({}, "Further settings of the optimizer, by its own names.")
    use_8bit_adam: bool = option(False, "The same as --optimizer adamw8bit.", binds=True)
    adam_beta1: float = option(0.9, "Beta 1 of optimizers that have it.", at_least=0, below=1)
    adam_beta2: float = option(0.999, "Beta 2 of optimizers that have it.", at_least=0, below=1)
    adam_weight_decay: float = option(
        1e-2,
        "Weight decay of optimizers that have it.",
        at_least=0,
        families=dict.fromkeys(NEWER, 1e-4),
    )
    adam_weight_decay_text_encoder: float | None = option(
        None,
        "Weight decay of the text encoders (default: Stable Diffusion 1.x and 2.x --adam_weight_decay).",
        at_least=0,
        families=dict.fromkeys(NEWER, 1e-3),
    )
    adam_epsilon: float = option(1e-8, "Epsilon of optimizers that have it.", above=0)
    prodigy_beta3: float | None = option(None, "Beta 3 of prodigy (default: the square root of --adam_beta2).")
    prodigy_decouple: bool = option(True, "Decoupled weight decay of prodigy.")
    prodigy_use_bias_correction: bool = option(True, "Bias correction of prodigy.")
    prodigy_safeguard_warmup: bool = option(True, "Safeguard of prodigy in a warm-up.")
    max_grad_norm: float = option(1.0, "Gradients that are longer are shortened to this length.", above=0)
    prediction_type: str | None = option(
        None,
        "What the UNet predicts (default: the model's own).",
        choices=("epsilon", "v_prediction"),
        binds=True,
        kohya={"v_parameterization": "as --prediction_type v_prediction; by default the model's scheduler says it"},
    )
    rescale_betas_zero_snr: bool | None = option(
        None,
        "Noise without signal at the last timestep (default: the model's own).",
        binds=True,
        kohya={"zero_terminal_snr": ""},
    )
    loss_type: str = option("l2", "Loss.", choices=("l2", "l1", "huber", "smooth_l1"), binds=True)
    huber_c: float = option(0.1, "Error from which huber and smooth_l1 grow linearly.", above=0, binds=True)
    huber_schedule: str = option(
        "snr", "How huber_c depends on the timestep.", choices=("constant", "exponential", "snr"), binds=True
    )
    huber_scale: float = option(
        1.0, "Factor on huber_c of the schedules constant and exponential.", above=0, binds=True
    )
    snr_gamma: float | None = option(
        None,
        "Gamma of min-SNR weighting; 5.0 is usual.",
        above=0,
        binds=True,
        in_header=True,
        kohya={"min_snr_gamma": ""},
    )
    debiased_estimation_loss: bool = option(False, "Debiased weighting of the loss.", binds=True)
    scale_v_pred_loss_like_noise_pred: bool = option(
        False,
        "v_prediction: weight the loss of the velocity by snr / (snr + 1), as if noise were predicted.",
        binds=True,
    )
    v_pred_like_loss: float | None = option(
        None, "epsilon: add this times the loss that a velocity would have.", above=0, binds=True
    )
    noise_offset: float = option(
        0.0, "Noise that all pixels of a channel share; 0.05 is usual.", at_least=0, binds=True, in_header=True
    )
    noise_offset_random_strength: bool = option(
        False, "Multiply --noise_offset by a number between 0 and 1, drawn for each image.", binds=True
    )
    adaptive_noise_scale: float | None = option(
        None,
        "Add this times the absolute mean of each channel of the latents to --noise_offset, not below 0 in all.",
        binds=True,
    )
    multires_noise_iterations: int | None = option(
        None, "Add noise of lower and lower resolution this many times; 6 to 10 is usual.", at_least=1, binds=True
    )
    multires_noise_discount: float = option(
        0.3, "Factor on each lower resolution of --multires_noise_iterations.", above=0, binds=True
    )
    ip_noise_gamma: float | None = option(
        None, "Perturb the noise of the input, not what is predicted; 0.1 is usual.", above=0, binds=True
    )
    ip_noise_gamma_random_strength: bool = option(
        False, "Multiply --ip_noise_gamma by a number between 0 and 1, drawn for each image.", binds=True
    )
    min_timestep: int | None = option(None, "Least timestep that is trained (default: 0).", at_least=0, binds=True)
    max_timestep: int | None = option(
        None, "Timestep below which is trained (default: the model's own number, mostly 1000).", at_least=1, binds=True
    )
    timestep_sampling: str | None = option(
        None,
        "SD3, FLUX.1: sigma, by --weighting_scheme in the model's schedule; or by sigmoid of a normal number, shifted "
        "by --discrete_flow_shift (shift) or by the image's size (flux_shift).",
        choices=TIMESTEP_SAMPLINGS,
        binds=True,
    )
    sigmoid_scale: float | None = option(
        None, "Scale of the normal number of --timestep_sampling sigmoid, shift and flux_shift.", above=0, binds=True
    )
    discrete_flow_shift: float | None = option(
        None,
        "SD3, FLUX.1: shift of the noise levels while training (default: the model's own; 1 for --timestep_sampling "
        "shift).",
        above=0,
        binds=True,
        kohya={"training_shift": ""},
    )
    weighting_scheme: str | None = option(
        None,
        "SD3, FLUX.1: distribution of noise levels (default: SD3 logit_normal, FLUX.1 none; kohya's uniform is none).",
        choices=WEIGHTINGS,
        binds=True,
    )
    logit_mean: float | None = option(None, "Mean of logit_normal (default: 0).", binds=True)
    logit_std: float | None = option(None, "Standard deviation of logit_normal (default: 1).", above=0, binds=True)
    mode_scale: float | None = option(None, "Scale of mode (default: 1.29).", binds=True)
    precondition_outputs: int | None = option(
        None,
        "SD3, FLUX.1: whether the loss compares images (1) or velocities (0) (default: SD3 1, FLUX.1 0).",
        choices=(0, 1),
        binds=True,
    )
    training_guidance_scale: float | None = option(
        None,
        "FLUX.1-dev: guidance that the model is given in training (default: 3.5). diffusers' and kohya's Flux scripts "
        "call it --guidance_scale, which is read so for FLUX.1.",
        at_least=0,
        binds=True,
    )
