"""Words that people type are read into requests; and back, so that a settings file fills the page."""

import re
from collections.abc import Mapping
from dataclasses import fields

from .foreign import is_number, lines_of, shortened
from .request import (
    Adapter,
    Axis,
    CompareRequest,
    Limits,
    Scheduler,
    Setting,
    joined,
    problems,
    setting_of,
)
from .training import Method, TrainRequest

SWEEP = "0, 0.25, 0.5, 0.75, 1, 1.25, 1.5"
MAX_SEEDS = 10_000  # a range is not spelled out beyond what any limit would allow


def read_seeds(text: str) -> tuple[int, ...]:
    """
    >>> read_seeds("1-3, 7")
    (1, 2, 3, 7)
    """
    seeds: list[int] = []
    for part in filter(None, re.split(r"[\s,;]+", text.strip())):
        match = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", part)
        if not match:
            raise ValueError(f"seeds are whole numbers and ranges such as 0-3, 7; got {shortened(part)!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= MAX_SEEDS:
            raise ValueError(f"a range of seeds goes up, by less than {MAX_SEEDS:,}; got {part!r}")
        seeds.extend(range(first, last + 1))
    return tuple(dict.fromkeys(seeds))


def read_strengths(text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in re.split(r"[\s,;]+", text.strip()) if part))
    except ValueError:
        raise ValueError(f"strengths are numbers such as 0.5, 1; got {shortened(text)!r}") from None


def read_placeholders(text: str) -> dict[str, tuple[str, ...]]:
    """
    >>> read_placeholders("subject = panda, red cactus")
    {'subject': ('panda', 'red cactus')}
    """
    placeholders: dict[str, tuple[str, ...]] = {}
    for line in filter(str.strip, lines_of(text)):
        name, equals, values = line.partition("=")
        name = name.strip().strip("{}")
        if not equals or not name.isidentifier():
            raise ValueError(f"a placeholder's line reads: subject = panda, cactus; got {shortened(line)!r}")
        if name in placeholders:
            raise ValueError(f"the placeholder {{{name}}} has two lines; wanted one, with commas between its values")
        placeholders[name] = tuple(dict.fromkeys(v.strip() for v in values.split(",") if v.strip()))
    return placeholders


NOTHING_SWEPT = "nothing more"


def read_settings(axis: str, values: str) -> tuple[Setting, ...]:
    """
    >>> [setting.label for setting in read_settings("steps", "10, 25")]
    ['10 steps', '25 steps']
    """
    if axis == NOTHING_SWEPT:
        return ()
    if axis not in list(Axis):
        raise ValueError(f"rows and columns go through {', '.join(Axis)} or {NOTHING_SWEPT}; got {shortened(axis)!r}")
    if axis == Axis.SCHEDULER:
        known = {str(kind).lower(): kind for kind in Scheduler}
        words = [word.strip() for word in re.split("[,;]", values) if word.strip()]
        if unknown := [word for word in words if word.lower() not in known]:
            raise ValueError(f"schedulers are {', '.join(Scheduler)}; got {shortened(unknown[0])!r}")
        found: list[object] = [known[word.lower()] for word in words]
    else:
        found = [part for part in re.split(r"[\s,;]+", values.strip()) if part]
        try:
            found = [float(part) for part in found]
            return tuple(setting_of(axis, value) for value in dict.fromkeys(found))
        except ValueError:
            example = "10, 25, 50" if axis == Axis.STEPS else "1, 4, 7.5"
            raise ValueError(f"values of {axis} are numbers such as {example}; got {shortened(values)!r}") from None
    return tuple(setting_of(axis, value) for value in dict.fromkeys(found))


def read_request(
    prompts: str,
    placeholders: str,
    seeds: str,
    labels: list[str],
    strengths: str,
    include_base: bool,
    negative_prompt: str,
    num_inference_steps: float | None,
    guidance_scale: float | None,
    scheduler: str,
    columns_axis: str = NOTHING_SWEPT,
    columns_values: str = "",
    rows_axis: str = NOTHING_SWEPT,
    rows_values: str = "",
    strengths_first: bool = False,
    *,
    adapters: Mapping[str, Adapter],
    limits: Limits,
) -> CompareRequest:
    """The page's fields, in their order.

    Raises:
        ValueError: everything that is wrong with them.
    """
    values = {"placeholders": {}, "seeds": (0,), "strengths": (1.0,)}  # stand in for what cannot be read
    found, unread = [], []
    if not is_number(num_inference_steps) or num_inference_steps != int(num_inference_steps):
        found.append(f"steps is a whole number; got {shortened(str(num_inference_steps))}")
        num_inference_steps = 1
    if scheduler not in list(Scheduler):
        found.append(f"schedulers are {', '.join(Scheduler)}; got {shortened(str(scheduler))!r}")
        scheduler = Scheduler.AS_SAVED
    if not is_number(guidance_scale):
        found.append(f"guidance is a number; got {shortened(str(guidance_scale))}")
        guidance_scale = 1
    for name, read, text in (
        ("placeholders", read_placeholders, placeholders),
        ("seeds", read_seeds, seeds),
        ("strengths", read_strengths, strengths),
    ):
        try:
            values[name] = read(text)
        except ValueError as error:
            unread.append(name)
            found.append(str(error))
    swept = {}
    for name, axis, text in (("columns_by", columns_axis, columns_values), ("rows_by", rows_axis, rows_values)):
        try:
            swept[name] = read_settings(axis, text)
        except ValueError as error:
            found.append(str(error))
        else:
            if axis != NOTHING_SWEPT and not swept[name]:
                found.append(f"{name.removesuffix('_by')} are to go through {axis}, and no value is given")
    found += [f"the adapter {shortened(label)} is not here any more" for label in labels if label not in adapters]
    request = CompareRequest(
        prompts=tuple(line.strip() for line in lines_of(prompts) if line.strip()),
        adapters=tuple(adapters[label] for label in labels if label in adapters),
        include_base=include_base,
        negative_prompt=negative_prompt.strip(),
        num_inference_steps=int(num_inference_steps),
        guidance_scale=float(guidance_scale),
        scheduler=Scheduler(scheduler),
        strengths_first=strengths_first,
        **values,
        **swept,
    )
    if "placeholders" not in unread:
        found += problems(request, limits)
    if found:
        raise ValueError(joined("Nothing was generated", found))
    return request


def unwritable(request: CompareRequest) -> list[str]:
    """Parts of a request that the page's fields would not give back: a comma in a value, a seed that comes twice."""
    adapters = {adapter.label: adapter for adapter in request.adapters}
    again = read_request(*fields_of(request), adapters=adapters, limits=Limits())
    return [field.name for field in fields(request) if getattr(again, field.name) != getattr(request, field.name)]


def fields_of(request: CompareRequest) -> tuple:
    """Inverse of `read_request`: what stands in the page's fields, in their order."""
    return (
        "\n".join(request.prompts),
        "\n".join(f"{name} = {', '.join(values)}" for name, values in request.placeholders.items()),
        ", ".join(map(str, request.seeds)),
        [adapter.label for adapter in request.adapters],
        ", ".join(str(s).removesuffix(".0") for s in request.strengths),
        request.include_base,
        request.negative_prompt,
        request.num_inference_steps,
        request.guidance_scale,
        str(request.scheduler),
        *fields_of_settings(request.columns_by),
        *fields_of_settings(request.rows_by),
        request.strengths_first,
    )


def fields_of_settings(settings: tuple[Setting, ...]) -> tuple[str, str]:
    """Inverse of `read_settings`."""
    if not settings:
        return NOTHING_SWEPT, ""
    return str(settings[0].axis), ", ".join(str(setting.value).removesuffix(".0") for setting in settings)


def read_train_request(
    prompt: str,
    method: str,
    steps: float | None,
    samples_of: str,
    rank: float,
    learning_rate: float | None,
    batch_size: float,
    train_text_encoder: bool,
    class_prompt: str,
    class_images: float,
    seed: float | None,
    name: str,
    optimizer: str = TrainRequest.optimizer,
    schedule: str = TrainRequest.schedule,
    use_dora: bool = False,
    tune: bool = False,
) -> TrainRequest:
    """The train tab's fields, in their order; what they hold is checked when the training is started.

    Raises:
        ValueError: a number was left empty.
    """
    numbers = {"the number of steps": steps, "the learning rate": learning_rate, "the seed": seed}
    if empty := [label for label, value in numbers.items() if value is None]:
        raise ValueError(joined("Nothing was started", [f"{label} is empty" for label in empty]))
    if odd := [label for label, value in numbers.items() if not is_number(value)]:
        raise ValueError(joined("Nothing was started", [f"{label} is no number" for label in odd]))
    return TrainRequest(
        instance_prompt=prompt.strip(),
        method=Method(method),
        max_train_steps=int(steps),
        rank=int(rank),
        learning_rate=float(learning_rate),
        train_batch_size=int(batch_size),
        train_text_encoder=train_text_encoder,
        validation_prompt=tuple(line.strip() for line in lines_of(samples_of) if line.strip()),
        class_prompt=class_prompt.strip(),
        num_class_images=int(class_images),
        seed=int(seed),
        name=name.strip(),
        optimizer=optimizer,
        schedule=schedule,
        use_dora=use_dora,
        tune=tune,
    )
