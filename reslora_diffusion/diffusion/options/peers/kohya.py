"""TOML configurations of kohya's scripts (train_network.py and its variants for SDXL, SD3 and FLUX.1).

What has another name here stands in the field of that option (`kohya=`), what is not here in `answers`. This module has
the rest: values that are written in another way, and defaults of kohya's that a configuration may rely on.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ....utils.option_parser import parse_file
from ....utils.options import Facts, facts_of
from ....utils.problems import BadInput
from ..adapter import KOHYA
from ..answers import DEFAULT_HERE, NOT_HERE, NOT_SUPPORTED, renamed
from ..data import READ_AS_TAGS
from ..dreambooth import DreamBoothOptions
from .kohya_dataset import BUCKET_DEFAULTS, is_datasets, read_datasets, sizes
from .kohya_families import OF_FLOWS, noise_levels, of_families
from .kohya_layers import NO_ARGUMENT, NOT_TRANSLATED, RATIOS, TRANSLATED, adapted_layers, last_step_of_encoders
from .kohya_rules import contradictions, differences, unsaid
from .translation import Translation, is_off

FACTS = facts_of(DreamBoothOptions)
# Names that no configuration of ours has and nearly every one of kohya's has one of.
OF_KOHYA = ("network_module", "network_dim", "train_data_dir", "dataset_config", "optimizer_type", "unet_lr")
# Of kohya's own, where diffusers' are others.
DEFAULTS: dict[str, Any] = {
    "lora_alpha": 1.0,
    "learning_rate": 2e-6,
    "train_batch_size": 1,
    "lr_warmup_steps": 0,
    "caption_extension": ".caption",
    "center_crop": True,
    "save_precision": "fp32",
}
STEPS = 1600
UNLIMITED = 1e9  # of a gradient's length
PRECISIONS = {"float": "fp32", "fp16": "fp16", "bf16": "bf16"}
LYCORIS = "lycoris.kohya"
PLAIN_MODULES = {*(f"networks.lora{of}" for of in ("", "_flux", "_sd3", "_lumina", "_fa")), LYCORIS}
SIZES = ("resolution", "enable_bucket", "bucket_no_upscale", *BUCKET_DEFAULTS)
DATA = ("train_data_dir", "reg_data_dir", *SIZES, "caption_extension", "caption_extention", "dataset_repeats")


def is_config(content: Mapping[str, Any]) -> bool:
    """Return whether a configuration is one of kohya's scripts."""
    return any(name in flat(content) for name in OF_KOHYA)


def flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Options in sections and outside of them: kohya's scripts ignore which section one is in."""
    options: dict[str, Any] = {}
    for name, value in content.items():
        options |= value if isinstance(value, dict) else {name: value}
    return options


def number(value: Any) -> float:
    """A number that may stand in quotes; raises `ValueError`."""
    return float(value)


class Kohya:
    """One configuration on its way to options here. A method of an option's name translates it; what it looks at
    besides must not depend on the order of the file."""

    def __init__(self, given: Mapping[str, Any], source: str) -> None:
        self.given, self.out = dict(given), Translation(source)
        self.of_datasets: dict[str, Any] = {}  # options that a file of datasets says for all of them

    def has(self, name: str) -> Any:
        """The value of an option that is used; None otherwise."""
        value = self.given.get(name)
        return None if is_off(value) else value

    def run(self) -> Translation:
        others = renamed()
        self.datasets()
        for name, value in self.given.items():
            if is_off(value):
                continue
            try:
                if own := METHODS.get(name):
                    own(self, name, value)
                elif name in others:
                    self.copy(name, others[name][0], value)
                elif name in FACTS:
                    self.copy(name, name, value)
                elif name in DEFAULT_HERE:
                    self.out.not_needed.append(name)
                elif name in NOT_HERE or name in NOT_SUPPORTED:
                    self.out.not_used[name] = (NOT_HERE | NOT_SUPPORTED)[name]
                else:
                    self.out.not_used[name] = "no such option is known of kohya's scripts"
            except ValueError as error:
                self.out.problems.append(f"{name}: {error}")
        self.sizes()
        try:
            adapted_layers(self.network_args_of(), self.given, self.given.get("network_module") == LYCORIS, self.out)
        except ValueError as error:
            self.out.problems.append(f"network_args: {error}")
        self.encoders()
        self.length()
        self.clipping()
        contradictions(self.given, self.out)
        unsaid(self.given, self.out)
        differences(self.given, self.out)
        noise_levels(self.given, self.out)
        self.out.of_families = of_families(self.given)
        self.out.values |= self.of_datasets
        of_adam = "adamw" in str(self.out.values.get("optimizer", "adamw")).lower()
        self.out.assume(**DEFAULTS, adam_weight_decay=0.01 if of_adam else 0.0)
        if self.out.values.get("train_text_encoder"):
            decay = self.out.values["adam_weight_decay"]
            self.out.assume(text_encoder_lr=self.out.values["learning_rate"], adam_weight_decay_text_encoder=decay)
        if "report_to" not in self.out.values:
            self.out.assume(report_to="tensorboard" if self.has("logging_dir") else "none")
        return self.out

    def copy(self, old: str, new: str, value: Any) -> None:
        """Take a value as it is; a number that the option here cannot be says that it is not used."""
        facts: Facts = FACTS[new]
        if isinstance(value, (int, float)) and not isinstance(value, bool) and facts.above is not None:
            if value <= facts.above:
                return
        self.out.take(old, **{new: value})

    # ------------------------------------------------------------------------------------------------- data

    def datasets(self) -> None:
        """`dataset_config`, which stands in place of all other options on data."""
        path = self.has("dataset_config")
        if not path:
            return
        try:
            content = parse_file("dataset_config", Path(path))
            if not is_datasets(content):
                raise BadInput([f"dataset_config {path}: wanted [[datasets]] with [[datasets.subsets]]"])
            program = {n: v for n, v in self.given.items() if n not in ("train_data_dir", "reg_data_dir")}
            program |= {"batch_size": program.get("train_batch_size")}
            found = read_datasets(content, f"dataset_config {path}", program)
        except BadInput as error:
            self.out.problems += error.problems
            return
        self.out.take("dataset_config", concepts=path)
        self.of_datasets = found.options
        self.out.not_used |= {f"dataset_config, {name}": reason for name, reason in found.not_used.items()}
        own = [name for name in DATA if not is_off(self.given.get(name)) and name not in SIZES]
        self.out.not_used |= dict.fromkeys(own, "dataset_config says what is trained on")

    def data(self, name: str, value: Any) -> None:
        if self.has("dataset_config"):
            return
        if name == "reg_data_dir":
            self.out.take(name, class_data_dir=value, with_prior_preservation=True)
        else:
            self.copy(name, renamed()[name][0] if name in renamed() else name, value)

    def sizes(self) -> None:
        named = [name for name in SIZES if not is_off(self.given.get(name))]
        if not named:
            return
        try:
            options, remarks = sizes(self.given)
        except ValueError as error:
            self.out.problems.append(f"resolution: {error}")
            return
        for name in named:
            if not self.has("enable_bucket") and name in ("bucket_no_upscale", *BUCKET_DEFAULTS):
                self.out.not_needed.append(name)
            else:
                self.out.names[name] = "--aspect_ratio_buckets auto" if name == "enable_bucket" else f"--{name}"
        self.out.values |= options
        if remarks:
            self.out.not_used["resolution"] = "; ".join(remarks)

    def keep_tokens(self, name: str, value: Any) -> None:
        if any(map(self.has, READ_AS_TAGS)):
            self.out.take(name, **{name: int(value) if name == "keep_tokens" else value})
        else:
            self.out.not_needed.append(name)

    def random_crop(self, name: str, value: Any) -> None:
        self.out.take(name, center_crop=False)

    def masked_loss(self, name: str, value: Any) -> None:
        if self.has("conditioning_data_dir") or self.has("alpha_mask") or self.has("dataset_config"):
            self.out.not_needed.append(name)
        else:
            self.out.problems.append("masked_loss: wanted conditioning_data_dir with masks, or alpha_mask")

    # -------------------------------------------------------------------------------------- model and adapter

    def clip_skip(self, name: str, value: Any) -> None:
        if int(value) > 1:
            self.out.take(name, skip_clip_layers=int(value) - 1)

    def attention(self, name: str, value: Any) -> None:
        self.out.not_needed.append(name)

    def network_module(self, name: str, value: Any) -> None:
        algorithm = self.network_args_of().get("algo", "lora") if value == LYCORIS else "lora"
        if value not in PLAIN_MODULES or str(algorithm).lower() not in ("lora", "locon"):
            kind = algorithm if value == LYCORIS else value
            self.out.problems.append(f"network_module: {kind} is no LoRA, which is what is trained here")
        else:
            self.out.not_needed.append(name)

    def network_args_of(self) -> dict[str, str]:
        pairs = self.given.get("network_args") or []
        pairs = pairs.split() if isinstance(pairs, str) else pairs
        return dict(str(pair).partition("=")[::2] for pair in pairs)

    def network_args(self, name: str, value: Any) -> None:
        for key, text in self.network_args_of().items():
            where = f"network_args, {key}"
            if key in RATIOS:
                self.out.take(where, loraplus_lr_ratio=number(text))
            elif key == "dora_wd" and self.given.get("network_module") == LYCORIS:
                self.out.take(where, use_dora=text.lower() in ("true", "1"))
            elif key not in TRANSLATED and not is_off(text):
                self.out.not_used[where] = f"got {text}; {NOT_TRANSLATED.get(key, NO_ARGUMENT)}"

    def network_weights(self, name: str, value: Any) -> None:
        self.out.take(name, network_weights=value, method="lora")

    def encoders(self) -> None:
        """Text encoders are trained unless a configuration says otherwise."""
        rates = self.given.get("text_encoder_lr")
        if rates in (None, "", []) and self.has("unet_lr"):
            rates = self.given.get("learning_rate", DEFAULTS["learning_rate"])
        rates = rates if isinstance(rates, list) else [rates]
        rate = next((number(r) for r in rates if r not in (None, "")), None)
        alone, cached = self.has("network_train_unet_only"), self.has("cache_text_encoder_outputs")
        trained = not alone and rate != 0 and (not cached or bool(rate))
        if len({*rates}) > 1:
            self.out.not_used["text_encoder_lr"] = f"one rate for each text encoder: got {rates}, {rates[0]} is used"
        if trained:
            self.out.take("text_encoder_lr" if rate else "network_train_unet_only", train_text_encoder=True)
            self.out.values |= {"text_encoder_lr": rate} if rate else {}
            self.out.assume(text_encoder_target_modules=[KOHYA])
            last_step_of_encoders(self.given, self.out)
            if "loraplus_lr_ratio" in self.out.values and "loraplus_lr_ratio" not in self.network_args_of():
                self.out.different["network_args, loraplus_unet_lr_ratio"] = "it is for the text encoders too"

    # ----------------------------------------------------------------------------------------------- training

    def unet_lr(self, name: str, value: Any) -> None:
        self.out.take(name, learning_rate=number(value))

    def learning_rate(self, name: str, value: Any) -> None:
        if not self.has("unet_lr"):
            self.out.take(name, learning_rate=number(value))
        elif self.given.get("text_encoder_lr") not in (None, ""):
            self.out.not_needed.append(name)  # else it is that of the text encoders

    def length(self) -> None:
        if passes := self.has("max_train_epochs"):
            self.out.take("max_train_epochs", num_train_epochs=int(passes))
            if self.has("max_train_steps"):
                self.out.not_used["max_train_steps"] = "max_train_epochs overrides it, as in kohya's scripts"
        elif steps := self.has("max_train_steps"):
            self.out.take("max_train_steps", max_train_steps=int(steps))
        else:
            self.out.assume(max_train_steps=STEPS)

    def skip(self, name: str, value: Any) -> None:
        """Another method looks at it."""

    def lr_scheduler_type(self, name: str, value: Any) -> None:
        self.out.problems.append(f"{name}: {NOT_HERE[name]}; got {value!r}")

    def clipping(self) -> None:
        """Gradients are not clipped at 0."""
        if (norm := self.given.get("max_grad_norm")) not in (None, ""):
            self.out.take("max_grad_norm", max_grad_norm=number(norm) or UNLIMITED)

    def optimizer_args(self, name: str, value: Any) -> None:
        pairs = value.split() if isinstance(value, str) else value
        self.out.take(name, optimizer_args=dict(str(pair).partition("=")[::2] for pair in pairs))

    def use_lion_optimizer(self, name: str, value: Any) -> None:
        self.out.take(name, optimizer="lion")

    def on_disk(self, name: str, value: Any) -> None:
        if self.has("output_dir"):
            self.out.take(name, encoding_cache_dir=f"{self.given['output_dir']}-encoded")

    def repository(self, name: str, value: Any) -> None:
        self.out.take(name, hub_model_id=value, push_to_hub=True)

    def v_parameterization(self, name: str, value: Any) -> None:
        self.out.take(name, prediction_type="v_prediction")

    # ------------------------------------------------------------------------------------------------- output

    def save_precision(self, name: str, value: Any) -> None:
        self.out.take(name, save_precision=PRECISIONS.get(value, value))

    def save_last(self, name: str, value: Any) -> None:
        """kohya's scripts count passes or steps back, checkpoints are counted here."""
        every = self.has("save_every_n_epochs" if "epochs" in name else "save_every_n_steps")
        if every:
            self.out.take(name, checkpoints_total_limit=max(1, int(value) // int(every)))
        else:
            self.out.not_needed.append(name)


METHODS: dict[str, Callable[[Kohya, str, Any], None]] = {
    **dict.fromkeys(("train_data_dir", "reg_data_dir", "caption_extension", "caption_extention"), Kohya.data),
    **dict.fromkeys((*SIZES, "dataset_config", "text_encoder_lr", "stop_text_encoder_training"), Kohya.skip),
    **dict.fromkeys(("max_train_epochs", "max_train_steps", "network_train_unet_only", "max_grad_norm"), Kohya.skip),
    **dict.fromkeys(("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk"), Kohya.on_disk),
    "huggingface_repo_id": Kohya.repository,
    **dict.fromkeys(("keep_tokens", "keep_tokens_separator"), Kohya.keep_tokens),
    **dict.fromkeys(OF_FLOWS, Kohya.skip),
    **dict.fromkeys(("xformers", "sdpa", "mem_eff_attn"), Kohya.attention),
    **dict.fromkeys(
        ("save_last_n_epochs", "save_last_n_epochs_state", "save_last_n_steps", "save_last_n_steps_state"),
        Kohya.save_last,
    ),
    **{
        name: getattr(Kohya, name)
        for name in (
            *("random_crop", "masked_loss", "clip_skip", "network_module", "network_args"),
            *("network_weights", "unet_lr", "learning_rate", "lr_scheduler_type", "optimizer_args"),
            *("use_lion_optimizer", "v_parameterization"),
            "save_precision",
        )
    },
}


def translated(given: Mapping[str, Any], source: str) -> Translation:
    """Options here for a flat configuration of kohya's scripts."""
    return Kohya(given, source).run()
