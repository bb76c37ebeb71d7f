"""A training that the page asks for, and the options of the script that it becomes."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from reslora_diffusion.methods.offers import offered_optimizers, offered_schedules

from .request import CompareRequest

IMAGES = "images"
SAMPLES_PER_RUN, CHECKPOINTS_PER_RUN = 8, 4
PLAIN_OPTIMIZER, NO_SCHEDULE = "adamw", "none"
OF_MODELS = ("prune",)  # schedules that leave a smaller model, and no adapter that could be compared
PAIR = ("lora", "reslora-block")  # contenders of --compare, trained one after the other on the same draws


class Method(StrEnum):
    LORA = "LoRA"
    INPUT = "ResLoRA, input"
    BLOCK = "ResLoRA, block"
    MIDDLE = "ResLoRA, middle"
    PAIR = "LoRA, then ResLoRA"

    @property
    def options(self) -> dict[str, str | list[str]]:
        if self is Method.PAIR:
            return {"compare": list(PAIR)}
        if self is Method.LORA:
            return {"method": "lora"}
        return {"method": "reslora", "shortcut": self.name.lower()}


@dataclass(frozen=True)
class TrainLimits:
    images: int = 64
    steps: int = 10_000
    rank: int = 128
    batch_size: int = 32
    prompt_characters: int = 300
    validation_prompts: int = 4
    class_images: int = 200


@dataclass(frozen=True)
class TrainRequest:
    """One training as the page asks for it; the names are the script's."""

    instance_prompt: str
    method: Method = Method.BLOCK
    max_train_steps: int = 800
    rank: int = 16
    learning_rate: float = 1e-3
    train_batch_size: int = 4
    train_text_encoder: bool = True
    validation_prompt: tuple[str, ...] = ()
    class_prompt: str = ""
    num_class_images: int = 40
    seed: int = 0
    name: str = ""
    optimizer: str = PLAIN_OPTIMIZER
    schedule: str = NO_SCHEDULE
    use_dora: bool = False
    tune: bool = False  # search learning rate and alpha first

    @property
    def features(self) -> list[str]:
        """The parts that it uses, by the names of the methods' `conflicts`."""
        shortcuts = ["none", "block"] if self.method is Method.PAIR else [self.method.options.get("shortcut", "none")]
        return [*shortcuts, self.optimizer, *(["dora"] if self.use_dora else [])]


def request_problems(request: TrainRequest, images: int, limits: TrainLimits) -> list[str]:
    """Everything that is wrong with a request, in words."""
    found = []
    if not 1 <= images <= limits.images:
        found.append(f"{images} images of the subject; wanted 1 to {limits.images}")
    if not request.instance_prompt:
        found.append("there is no prompt for the images")
    for prompt in (request.instance_prompt, request.class_prompt, *request.validation_prompt):
        if len(prompt) > limits.prompt_characters:
            found.append(f"a prompt has {len(prompt):,} characters; at most {limits.prompt_characters} are taken")
    if len(request.validation_prompt) > limits.validation_prompts:
        found.append(f"{len(request.validation_prompt)} sample prompts; at most {limits.validation_prompts}")
    ranges = (
        ("steps", request.max_train_steps, limits.steps),
        ("rank", request.rank, limits.rank),
        ("batch size", request.train_batch_size, limits.batch_size),
        ("class images", request.num_class_images, limits.class_images),
    )
    found += [f"{name} lies between 1 and {most}; got {v}" for name, v, most in ranges if not 1 <= v <= most]
    schedules = {offer.value: offer.reasons for offer in offered_schedules(request.features)}
    if request.schedule != NO_SCHEDULE:
        unknown = (f"{request.schedule}: there is none of this name",)
        found += [f"schedule {why}" for why in schedules.get(request.schedule, unknown)]
    optimizers = {offer.value: offer.reasons for offer in offered_optimizers(request.features)}
    if request.optimizer not in (PLAIN_OPTIMIZER, *optimizers):
        found.append(f"there is no optimizer {request.optimizer}")
    found += [f"optimizer {request.optimizer}: {why}" for why in optimizers.get(request.optimizer, ())]
    if request.tune and images < 2:
        found.append("a search holds images out to measure on; wanted two different images or more")
    if request.tune and request.method is Method.PAIR:
        found.append("a search is for one method; wanted LoRA or ResLoRA alone")
    if not 0 < request.learning_rate <= 1:
        found.append(f"the learning rate lies between 0 and 1; got {request.learning_rate:g}")
    if not 0 <= request.seed < 2**32:
        found.append(f"the seed is a whole number from 0 to {2**32 - 1}; got {request.seed}")
    return found


def options_of(request: TrainRequest, base: str, resolution: int, folder: Path) -> dict:
    """The script's options by name, those alone that differ from its defaults or that a reader wants to see."""
    r = request
    options = {
        "pretrained_model_name_or_path": base,
        "resolution": resolution,
        "instance_data_dir": str(folder / IMAGES),
        "instance_prompt": r.instance_prompt,
        **r.method.options,
        "rank": r.rank,
        "learning_rate": r.learning_rate,
        "max_train_steps": r.max_train_steps,
        "train_batch_size": r.train_batch_size,
        "train_text_encoder": r.train_text_encoder,
        "seed": r.seed,
        "report_to": "none",
        "checkpointing_steps": max(1, r.max_train_steps // CHECKPOINTS_PER_RUN),
        "output_dir": str(folder),
    }
    if r.optimizer != PLAIN_OPTIMIZER:
        options["optimizer"] = r.optimizer
    if r.schedule != NO_SCHEDULE:
        options["schedule"] = r.schedule
    if r.use_dora:
        options["use_dora"] = True
    if r.validation_prompt:
        options |= {
            "validation_prompt": list(r.validation_prompt),
            "num_validation_images": 2,
            "validation_guidance_scale": CompareRequest.guidance_scale,
            "validation_steps": max(1, r.max_train_steps // SAMPLES_PER_RUN),
        }
    if r.class_prompt:
        options |= {
            "with_prior_preservation": True,
            "class_prompt": r.class_prompt,
            "class_data_dir": str(folder / "class_images"),
            "num_class_images": r.num_class_images,
        }
    return options
