"""Omniglot reads the official layout, Glyphs renders good classes, specs name their sources."""

from __future__ import annotations

import io
import itertools
import os
import re
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from fastmeta.data import Episodes, Glyphs, Omniglot, Sinusoid, from_spec, omniglot

OMNIGLOT = Path(
    os.environ.get("FASTMETA_OMNIGLOT")
    or Path(__file__).resolve().parents[3] / "shared" / "data" / "omniglot"
)
needs_omniglot = pytest.mark.skipif(
    not (OMNIGLOT / "images_background.zip").exists(),
    reason=f"no Omniglot archives in {OMNIGLOT}; set FASTMETA_OMNIGLOT to their folder",
)
incomplete = pytest.mark.filterwarnings("ignore:.*characters, the published:UserWarning")

FIRST = "images_background/Aaa/character01/0003_01.png"

Files = dict[str, bytes]


# Omniglot, made small


def png(drawing: Image.Image) -> bytes:
    buffer = io.BytesIO()
    drawing.save(buffer, "PNG")
    return buffer.getvalue()


def stroke(character: int, drawer: int) -> Image.Image:
    """105 x 105, 1 bit, ink 0: a bar whose place tells the character and the drawer."""
    image = Image.new("1", (105, 105), 1)
    left, top = 5 + 8 * character, 5 + 16 * drawer
    ImageDraw.Draw(image).rectangle((left, top, left + 15, top + 31), fill=0)
    return image


def small_part(part: str, drawers: int = 4) -> Files:
    characters = ["Bbb/character01", "Aaa/character02", "Aaa/character01"]
    return {
        f"images_{part}/{name}/{i + 1:04d}_{drawer + 1:02d}.png": png(stroke(i, drawer))
        for i, name in enumerate(characters)
        for drawer in range(drawers)
    }


def write_folder(root: Path, files: Files) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_zip(root: Path, files: Files, part: str = "background") -> Path:
    root.mkdir(exist_ok=True)
    with zipfile.ZipFile(root / f"images_{part}.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return root


@incomplete
@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_omniglot_reads_folder_and_archive(tmp_path: Path, write: Callable) -> None:
    files = {
        **small_part("background"),
        "__MACOSX/images_background/Aaa/character01/0001_01.png": b"not an image",
        "images_background/notes.txt": b"not an image",
    }
    root = write(tmp_path / "data", files)
    listing = sorted(root.rglob("*"))
    source = Omniglot(root, rotations=False, cache=tmp_path / "cache")
    assert source.class_names == ["Aaa/character01", "Aaa/character02", "Bbb/character01"]
    assert source.images.shape == (3, 4, 1, 28, 28) and source.images.dtype == torch.uint8
    for row, character in enumerate([2, 1, 0]):
        for drawer in range(4):
            y = (5 + 16 * drawer + 16) * 28 / 105
            x = (5 + 8 * character + 8) * 28 / 105
            assert source.images[row, drawer, 0, int(y), int(x)] > 230
    assert sorted(root.rglob("*")) == listing


@incomplete
def test_omniglot_ink_is_white_and_resizing_keeps_its_amount(tmp_path: Path) -> None:
    root = write_zip(tmp_path / "data", small_part("background"))
    image = Omniglot(root, rotations=False, cache=tmp_path).images[0, 0].double()
    share_of_ink = 16 * 32 / 105**2
    assert image.min() == 0 and image.max() == 255
    assert ((image > 0) & (image < 255)).any()
    assert image.mean() / 255 == pytest.approx(share_of_ink, rel=0.02)


@incomplete
def test_omniglot_rotations_are_classes_of_their_own(tmp_path: Path) -> None:
    root = write_zip(tmp_path / "data", small_part("background"))
    upright = Omniglot(root, rotations=False, cache=tmp_path)
    rotated = Omniglot(root, cache=tmp_path)
    assert rotated.num_classes == len(set(rotated.class_names)) == 12
    for turn in range(4):
        expected = np.rot90(upright.images.numpy(), turn, axes=(3, 4))
        np.testing.assert_array_equal(rotated.images[3 * turn : 3 * turn + 3].numpy(), expected)
    assert rotated.class_names[3] == "Aaa/character01@90"


@incomplete
def test_omniglot_evaluation_has_no_rotations_unless_asked(tmp_path: Path) -> None:
    root = write_zip(tmp_path / "data", small_part("evaluation"), "evaluation")
    assert Omniglot(root, "evaluation", cache=tmp_path).num_classes == 3
    assert Omniglot(root, "evaluation", rotations=True, cache=tmp_path).num_classes == 12


@incomplete
def test_omniglot_decodes_once_and_again_when_the_files_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folder(tmp_path / "data", small_part("background"))
    first = Omniglot(root, cache=tmp_path / "cache")
    decode = omniglot._decode
    monkeypatch.setattr(omniglot, "_decode", lambda *_: pytest.fail("decoded again"))
    second = Omniglot(root, cache=tmp_path / "cache")
    assert torch.equal(first.images, second.images) and first.class_names == second.class_names
    os.utime(root / FIRST, ns=(0, 0))
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        Omniglot(root, cache=tmp_path / "cache")
    monkeypatch.setattr(omniglot, "_decode", decode)
    write_folder(root, {FIRST: png(stroke(9, 3))})
    third = Omniglot(root, cache=tmp_path / "cache")
    assert not torch.equal(first.images[0, 0], third.images[0, 0])


def test_omniglot_says_when_characters_are_missing(tmp_path: Path) -> None:
    root = write_zip(tmp_path / "data", small_part("background"))
    with pytest.warns(UserWarning, match="has 3 characters, the published background part has 964"):
        Omniglot(root, cache=tmp_path)


@incomplete
def test_omniglot_paper_split_needs_the_whole_data_set(tmp_path: Path) -> None:
    root = write_zip(tmp_path / "data", small_part("background"))
    write_zip(root, small_part("evaluation"), "evaluation")
    with pytest.raises(ValueError, match=r"expects the 1623 different characters .* has 3"):
        Omniglot(root, "train", cache=tmp_path)


def test_omniglot_paper_split_is_a_partition_of_the_published_sizes(tmp_path: Path) -> None:
    dots = [png(Image.new("L", (2, 2), grey)) for grey in range(256)]
    for part, first, count in (("background", 0, 964), ("evaluation", 964, 659)):
        names = [f"Alphabet{i // 40:02d}/character{i % 40 + 1:02d}" for i in range(1623)]
        files = {
            f"images_{part}/{names[i]}/{i + 1:04d}_01.png": dots[i % 256]
            for i in range(first, first + count)
        }
        write_zip(tmp_path, files, part)
    whole = {}
    for part in ("background", "evaluation"):
        source = Omniglot(tmp_path, part, rotations=False, size=2, cache=tmp_path)
        whole.update(zip(source.class_names, source.images, strict=True))
    sizes = []
    for split in ("train", "validation", "test"):
        source = Omniglot(tmp_path, split, rotations=False, size=2, cache=tmp_path)
        assert source.class_names == sorted(source.class_names)
        for name, image in zip(source.class_names, source.images, strict=True):
            assert torch.equal(image, whole.pop(name))
        sizes.append(source.num_classes)
    assert sizes == [1028, 172, 423] and not whole


def test_omniglot_paper_split_needs_as_many_drawings_of_every_character(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def part(root: Path, name: str, *_: object) -> tuple[list[str], np.ndarray]:
        count, drawers = {"background": (964, 20), "evaluation": (659, 19)}[name]
        return [f"{name}{i}" for i in range(count)], np.zeros((count, drawers, 2, 2), np.uint8)

    monkeypatch.setattr(omniglot, "_part", part)
    with pytest.raises(ValueError, match="differ in drawings a character"):
        Omniglot("anywhere", "test")


def broken(change: Callable[[Files], object]) -> Files:
    files = small_part("background")
    change(files)
    return files


LAYOUT = r"images_background/ALPHABET/characterNN/IIII_JJ\.png"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"images_background/a/b.png": b""}, f"{LAYOUT}.*found images_background/a/b.png"),
        (broken(lambda files: files.pop(FIRST)), r"got 3 \(Aaa/character01\) to 4"),
        (broken(lambda files: files.update({FIRST: b"?"})), f"cannot decode {FIRST}"),
        (
            broken(lambda files: files.update({FIRST: png(Image.new("1", (9, 8)))})),
            f"square drawings, {FIRST} .* is 9 x 8",
        ),
    ],
    ids=["layout", "uneven", "broken image", "not square"],
)
@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_omniglot_wrong_files(tmp_path: Path, write: Callable, files: Files, message: str) -> None:
    root = write(tmp_path / "data", files)
    with pytest.raises(ValueError, match=message):
        Omniglot(root, cache=tmp_path / "cache")


def test_omniglot_wrong_places(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"nowhere is not a folder; .*{LAYOUT}"):
        Omniglot(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"{LAYOUT}.*; found nothing"):
        Omniglot(tmp_path)
    (tmp_path / "images_background.zip").write_bytes(b"PK but no archive")
    with pytest.raises(ValueError, match="not a readable zip archive"):
        Omniglot(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"found images_background\.zip"):
        Omniglot(tmp_path, "evaluation")


def test_omniglot_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split: expected one of background, .* got 'both'"):
        Omniglot(tmp_path, "both")
    with pytest.raises(ValueError, match="size: expected an integer >= 1, got 0"):
        Omniglot(tmp_path, size=0)


# Omniglot, the real one


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.rotating
@needs_omniglot
@pytest.mark.parametrize(
    ("split", "classes"),
    [("background", 4 * 964), ("evaluation", 659), ("train", 4 * 1028), ("validation", 172),
     ("test", 423)],
)  # fmt: skip
def test_real_omniglot_has_the_published_sizes(decoded: Path, split: str, classes: int) -> None:
    source = Omniglot(OMNIGLOT, split, cache=decoded)
    assert source.images.shape == (classes, 20, 1, 28, 28)
    assert len(set(source.class_names)) == classes
    share_of_ink = source.images.double().mean().item() / 255
    assert 0.05 < share_of_ink < 0.12


@needs_omniglot
def test_real_omniglot_splits_are_disjoint(decoded: Path) -> None:
    def names(*splits: str) -> list[str]:
        sources = [Omniglot(OMNIGLOT, s, rotations=False, cache=decoded) for s in splits]
        return sorted(name for source in sources for name in source.class_names)

    everything = names("background", "evaluation")
    assert len(set(everything)) == 1623
    assert names("train", "validation", "test") == everything


# Glyphs


def nearest_image_accuracy(source: Glyphs, size: int) -> float:
    """5-way 1-shot, nearest support image by pixels."""
    support, _, query, labels = Episodes(source, 5, 1, 5, tasks=200)[0]
    distances = torch.cdist(query.view(200, 25, size**2), support.view(200, 5, size**2))
    return (distances.argmin(-1) == labels).double().mean().item()


@pytest.fixture(scope="module")
def validation_glyphs(tmp_path_factory: pytest.TempPathFactory) -> Glyphs:
    return Glyphs("validation", cache=tmp_path_factory.mktemp("cache"))


def test_glyphs_are_inked_and_centred(validation_glyphs: Glyphs) -> None:
    images = validation_glyphs.images[:, :, 0].double() / 255
    assert images.shape[1:] == (20, 28, 28) and validation_glyphs.num_classes > 250
    ink = images.mean((-1, -2))
    assert (images.amax((-1, -2)) > 0.5).double().mean() > 0.99
    assert ink.min() > 0.005 and ink.max() < 0.7
    place = torch.arange(28).double() + 0.5
    for axis in (-1, -2):
        centre = (images.sum(axis) * place).sum(-1) / images.sum((-1, -2))
        assert (centre - 14).abs().mean() < 2


def test_glyph_examples_of_a_class_differ(validation_glyphs: Glyphs) -> None:
    flat = validation_glyphs.images.flatten(2).double()
    distances = torch.cdist(flat, flat) + torch.eye(20) * 1e9
    assert distances.min() > 0


def test_glyph_tasks_are_neither_chance_nor_solved_by_pixels(validation_glyphs: Glyphs) -> None:
    assert 0.3 < nearest_image_accuracy(validation_glyphs, 28) < 0.7


@pytest.fixture(scope="module")
def glyph_names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("cache")
    splits = ("train", "validation", "test")
    return {split: Glyphs(split, 8, 1, cache=folder).class_names for split in splits}


def test_glyph_splits_share_no_letter(glyph_names: dict[str, list[str]]) -> None:
    everything = list(itertools.chain(*glyph_names.values()))
    assert len(set(everything)) == len(everything) > 3000
    assert len(glyph_names["train"]) > 2000 and len(glyph_names["test"]) > 500
    splits_of = defaultdict(set)
    for split, names in glyph_names.items():
        for name in names:
            if letter := re.search(r"LATIN (?:SMALL|CAPITAL) LETTER (\w)( WITH|$)", name):
                splits_of[letter[1]].add(split)
    assert len(splits_of) == 26
    assert all(len(splits) == 1 for splits in splits_of.values())


def test_glyphs_depend_on_the_seed_but_classes_do_not(
    validation_glyphs: Glyphs, tmp_path: Path
) -> None:
    again = Glyphs("validation", cache=tmp_path / "a")
    other = Glyphs("validation", seed=1, cache=tmp_path / "b")
    assert torch.equal(again.images, validation_glyphs.images)
    assert other.class_names == validation_glyphs.class_names
    assert not torch.equal(other.images, validation_glyphs.images)


def test_glyph_twins_are_one_class(glyph_names: dict[str, list[str]]) -> None:
    names = list(itertools.chain(*glyph_names.values()))
    twins = ["LATIN CAPITAL LETTER A", "GREEK CAPITAL LETTER ALPHA", "CYRILLIC CAPITAL LETTER A"]
    assert sum(name.split(" ", 1)[1] in twins for name in names) == 1
    assert not any("COMBINING" in name or "BRAILLE" in name for name in names)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"split": "background"}, ValueError, "split: expected one of train, validation, test"),
        ({"size": 7}, ValueError, "size: expected an integer >= 8, got 7"),
        ({"examples": 0}, ValueError, "examples: expected an integer >= 1, got 0"),
        ({"seed": -1}, ValueError, "seed: .* got -1"),
        ({"examples": 2.5}, TypeError, "examples: .* got 2.5 of type float"),
    ],
)
def test_bad_arguments_of_glyphs(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Glyphs(**arguments)


@pytest.mark.parametrize("module", ["PIL", "matplotlib"])
def test_glyphs_without_optional_packages(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module}: pip install fastmeta\[train\]"):
        Glyphs()


# Sources by name


@incomplete
@pytest.mark.parametrize(("split", "classes"), [("train", 12), ("evaluation", 3)])
def test_spec_omniglot_official(tmp_path: Path, split: str, classes: int) -> None:
    for part in ("background", "evaluation"):
        write_zip(tmp_path, small_part(part), part)
    source = from_spec(f"omniglot:{tmp_path}", split, cache=tmp_path)
    assert isinstance(source, Omniglot) and source.num_classes == classes


@pytest.mark.parametrize(
    ("spec", "split", "protocol", "chosen"),
    [
        ("omniglot:data", "train", "official", "background"),
        ("omniglot:data", "evaluation", "official", "evaluation"),
        ("omniglot:data", "train", "paper", "train"),
        ("omniglot:data", "evaluation", "paper", "test"),
        ("glyphs", "train", "official", "train"),
        ("glyphs", "evaluation", "paper", "test"),
    ],
)
def test_spec_chooses_the_split(
    monkeypatch: pytest.MonkeyPatch, spec: str, split: str, protocol: str, chosen: str
) -> None:
    for name in ("Omniglot", "Glyphs"):
        monkeypatch.setattr(f"fastmeta.data.specs.{name}", lambda *args, cache: args[-1])
    assert from_spec(spec, split, protocol) == chosen


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_spec_sinusoid(split: str) -> None:
    assert isinstance(from_spec("sinusoid", split), Sinusoid)


@pytest.mark.parametrize("spec", ["", "omniglot", "omniglot:", "images:", "glyphs:x", "imagenet"])
def test_unknown_spec(spec: str) -> None:
    known = "omniglot:PATH, images:PATH, glyphs, sinusoid"
    with pytest.raises(ValueError, match=f"spec: expected one of {known}, got '{spec}'"):
        from_spec(spec)


@pytest.mark.parametrize("option", [{"split": "test"}, {"protocol": "mine"}])
def test_unknown_split_or_protocol(option: dict[str, str]) -> None:
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name}: expected one of .* got '{value}'"):
        from_spec("sinusoid", **option)
