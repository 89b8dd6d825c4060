"""Sources of training and validation tasks."""

from __future__ import annotations

from fastmeta.data import ClassImages, Glyphs, Omniglot, Source, from_spec
from fastmeta.data.images import stable_fraction
from fastmeta.data.specs import has_image_folder, image_folder
from fastmeta.training.config import TrainConfig
from fastmeta.training.evaluation import VALIDATION_STREAM, Evaluator

_HELD_OUT = 0.1  # of the training characters, for validation, if the data have no such split


def training_sources(config: TrainConfig, source: Source | None) -> tuple[Source, Evaluator | None]:
    """Source of training tasks, and the validation on classes that are not trained on.

    Args:
        config: options of the run.
        source: training images of the caller's own, in place of ``config.data``.

    Returns:
        The source, and the evaluator; None if ``eval_every`` is 0.
    """
    training = source or from_spec(
        config.data, "train", config.protocol, min_images=config.shots + config.queries
    )
    if config.eval_every == 0:
        return training, None
    held_out = None if source else validation_source(config)
    if held_out is None and isinstance(training, ClassImages):
        training, held_out = hold_out(training, config.ways)
    validator = Evaluator(
        held_out or training,
        config.ways,
        config.shots,
        config.queries,
        config.eval_tasks,
        config.seed,
        VALIDATION_STREAM,
        config.device,
    )
    return training, validator


def validation_source(config: TrainConfig) -> Source | None:
    """Validation split of the data, if there is one."""
    name, _, root = config.data.partition(":")
    if name == "glyphs":
        return Glyphs("validation")
    if name == "omniglot" and config.protocol == "paper":
        return Omniglot(root, "validation")
    if name == "images" and has_image_folder(root, "validation"):
        return image_folder(root, "validation", min_images=config.shots + config.queries)
    return None


def hold_out(source: ClassImages, ways: int) -> tuple[ClassImages, ClassImages]:
    """Split classes into nine tenths and one tenth (at least ``ways``), always in the same way.

    All rotations of a character, ``NAME`` and ``NAME@90``, are on the same side.
    """
    characters = [name.partition("@")[0] for name in source.class_names]
    order = sorted(set(characters), key=lambda name: stable_fraction(name, "validation"))
    held_out = set(order[: max(ways, round(_HELD_OUT * len(order)))])

    def part(wanted: bool) -> ClassImages:
        rows = [i for i, name in enumerate(characters) if (name in held_out) is wanted]
        return source.subset(rows)

    return part(False), part(True)
