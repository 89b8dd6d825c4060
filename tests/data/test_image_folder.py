"""Images in folders: which are read, how, and what is said where they cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmeta import cli
from fastmeta.data import Episodes, ImageFolder, from_spec
from fastmeta.training.config import TrainConfig
from fastmeta.training.sources import training_sources, validation_source


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(file: Path, value: int, mode: str = "L", size: tuple[int, int] = (6, 4)) -> Path:
    """An image, width 6 and height 4, whose left column is white and whose rest has one value."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size, value if mode == "L" else (value, 0, 255 - value))
    image.paste(255 if mode == "L" else (255, 255, 255), (0, 0, 1, size[1]))
    image.save(file)
    return file


def write_classes(root: Path, classes: int = 3, images: int = 2, **how) -> Path:
    for c in range(classes):
        for i in range(images):
            write(root / f"class{c}" / f"{i}.png", 10 * c + i, **how)
    return root


def test_every_folder_of_images_is_a_class_in_order_of_names(tmp_path):
    write(tmp_path / "b" / "2.png", 22)
    write(tmp_path / "b" / "1.PNG", 21)
    write(tmp_path / "a" / "deep" / "x.bmp", 11)
    write(tmp_path / "a" / "deep" / "y.gif", 12)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "b" / "._2.png").write_bytes(b"no image either")
    write(tmp_path / "beside.png", 1)
    source = ImageFolder(tmp_path)
    assert source.class_names == ["a/deep", "b"]
    assert source.images.dtype == torch.uint8 and source.images.shape == (2, 2, 1, 4, 6)
    assert source.images[..., 0, -1, -1].tolist() == [[11, 12], [21, 22]]
    assert (source.images[..., 0] == 255).all()
    assert Episodes(source, 2, 1, 1, tasks=3)[0].support_x.shape == (3, 2, 1, 4, 6)


def test_colours_and_grey_ones_among_them(tmp_path):
    write(tmp_path / "a" / "1.png", 7, "RGB")
    write(tmp_path / "b" / "1.png", 9)
    pixels = ImageFolder(tmp_path).images[..., -1, -1]
    assert pixels.tolist() == [[[7, 0, 248]], [[9, 9, 9]]]


def test_the_middle_square_is_resized(tmp_path):
    write(tmp_path / "a" / "wide.png", 100, size=(60, 20))
    write(tmp_path / "b" / "high.png", 50, size=(20, 60))
    images = ImageFolder(tmp_path, size=10).images
    assert images.shape == (2, 1, 1, 10, 10)
    assert (images[0] == 100).all()  # the white column is not in the middle
    assert images[1, 0, 0, 5, 0] > 50 and images[1, 0, 0, 5, -1] == 50


def test_images_stand_as_the_camera_says(tmp_path):
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = Image.new("L", (16, 8), 0)
    image.paste(255, (0, 0, 8, 8))
    image.save(tmp_path / "a" / "1.jpg", exif=exif, quality=100)
    upright = ImageFolder(tmp_path).images[0, 0, 0]
    assert upright.shape == (16, 8)
    assert upright[0].min() > 250 and upright[-1].max() < 5


def test_classes_of_different_sizes_keep_all_their_images(tmp_path):
    write_classes(tmp_path)
    write(tmp_path / "class1" / "more.png", 99)
    source = ImageFolder(tmp_path)
    assert source.counts == [2, 3, 2] and source.num_examples == 2
    assert source.flat[:, 0, -1, -1].tolist() == [0, 1, 10, 11, 99, 20, 21]
    with pytest.raises(ValueError, match="images: expected equally many of each class, got 2 to 3"):
        _ = source.images
    drawn = {name for i in range(20) for name in Episodes(source, 3, 1, 1, 4).origin(i).query[0]}
    assert drawn == set(source.files)


def test_small_classes_are_left_out_and_named(tmp_path):
    write_classes(tmp_path, images=3)
    write(tmp_path / "lone" / "1.png", 1)
    (tmp_path / "empty").mkdir()
    with pytest.warns(UserWarning, match=r"1 of 5 classes .* fewer than 1 images .* empty \(0\)"):
        assert ImageFolder(tmp_path).counts == [3, 3, 3, 1]
    expected = r"2 of 5 classes have fewer than 2 images and are left out: empty \(0\), lone \(1\)"
    with pytest.warns(UserWarning, match=expected):
        source = ImageFolder(tmp_path, min_images=2)
    assert source.class_names == ["class0", "class1", "class2"]
    with pytest.raises(ValueError, match="with at least 4 images, the largest has 3"):
        ImageFolder(tmp_path, min_images=4)


def test_too_small_a_class_is_named_with_the_way_out(tmp_path):
    write_classes(tmp_path, images=4)
    write(tmp_path / "lone" / "1.png", 1)
    source = ImageFolder(tmp_path)
    with pytest.raises(ValueError) as refused:
        Episodes(source, 2, 1, 3, tasks=1)
    assert str(refused.value) == (
        "shots + queries: expected at most 1, the size of the smallest class, lone, got 1 + 3; "
        "source.at_least(4) leaves small classes out"
    )
    with pytest.warns(UserWarning, match=r"1 of 4 .* left out: lone \(1\)"):
        Episodes(source.at_least(4), 2, 1, 3, tasks=1)


def test_hidden_folders_are_no_classes(tmp_path):
    write_classes(tmp_path / "images", classes=2)
    write(tmp_path / "images" / ".ipynb_checkpoints" / "1.png", 1)
    write(tmp_path / "images" / "class0" / ".ipynb_checkpoints" / "1.png", 1)
    assert ImageFolder(tmp_path / "images").class_names == ["class0", "class1"]


def test_links_are_followed(tmp_path):
    write_classes(tmp_path / "elsewhere", classes=2)
    write(tmp_path / "one.png", 77)
    root = tmp_path / "images"
    (root / "own").mkdir(parents=True)
    (root / "linked").symlink_to(tmp_path / "elsewhere" / "class1")
    (root / "own" / "1.png").symlink_to(tmp_path / "one.png")
    (root / "own" / "back").symlink_to(root)  # which holds itself
    source = ImageFolder(root)
    assert source.class_names == ["linked", "own"] and source.counts == [2, 1]
    assert source.files == ["linked/0.png", "linked/1.png", "own/1.png"]
    (root / "own" / "2.png").symlink_to(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match=r"own/2.png is a link to nothing"):
        ImageFolder(root)


def test_an_episode_tells_its_classes_and_files(tmp_path):
    write_classes(tmp_path, classes=5, images=4)
    source = ImageFolder(tmp_path)
    episodes = Episodes(source, 3, 2, 1, tasks=2, seed=5)
    origin, episode = episodes.origin(3), episodes[3]
    for names, images in ((origin.support, episode.support_x), (origin.query, episode.query_x)):
        values = (images[:, :, 0, -1, -1] * 255).round().int().tolist()
        files = [[f"class{value // 10}/{value % 10}.png" for value in task] for task in values]
        assert names == files
    assert origin.class_names == [
        [task[0][:6], task[2][:6], task[4][:6]] for task in origin.support
    ]


def test_changed_images_are_read_again(tmp_path):
    write_classes(tmp_path)
    assert ImageFolder(tmp_path).images[0, 0, 0, -1, -1] == 0
    write(tmp_path / "class0" / "0.png", 77, size=(6, 4))
    assert ImageFolder(tmp_path).images[0, 0, 0, -1, -1] == 77
    assert ImageFolder(tmp_path, size=2).images.shape[-2:] == (2, 2)


def broken(root: Path) -> None:
    (write_classes(root) / "class1" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")


def deep(root: Path) -> None:
    Image.new("I;16", (6, 4), 300).save(write_classes(root) / "class0" / "1.png")


def mixed(root: Path) -> None:
    write(write_classes(root) / "class2" / "1.png", 1, size=(5, 5))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda root: None, FileNotFoundError, "images is not a folder"),
        (
            lambda root: root.mkdir(),
            ValueError,
            "to hold a folder of images .*found nothing",
        ),
        (lambda root: write(root / "1.png", 1), ValueError, "for each class; found 1.png"),
        (broken, ValueError, "cannot decode .*class1/1.png"),
        (deep, ValueError, "class0/1.png: expected 8 bits per channel, got mode I;16"),
        (mixed, ValueError, "class0/0.png is 6 x 4, class2/1.png is 5 x 5"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, make, error, message):
    make(tmp_path / "images")
    with pytest.raises(error, match=message):
        ImageFolder(tmp_path / "images")


def test_the_size_is_positive(tmp_path):
    with pytest.raises(ValueError, match="size: expected an integer >= 1, got 0"):
        ImageFolder(tmp_path, size=0)


# On the command line


@pytest.mark.parametrize(("argument", "size"), [("", (4, 6)), ("@12", (12, 12))])
@pytest.mark.parametrize(("split", "classes"), [("train", 4), ("evaluation", 3)])
def test_a_spec_names_path_and_size(tmp_path, argument, size, split, classes):
    write_classes(tmp_path / "my@data" / "train", classes=4)
    write_classes(tmp_path / "my@data" / "test", classes=3)
    source = from_spec(f"images:{tmp_path}/my@data{argument}", split)
    assert source.images.shape == (classes, 2, 1, *size)


def test_a_missing_split_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected .*/test to hold a folder of images"):
        from_spec(f"images:{tmp_path}", "evaluation")


def test_the_folder_val_is_for_validation(tmp_path):
    write_classes(tmp_path / "train")
    config = TrainConfig("maml", f"images:{tmp_path}", str(tmp_path / "out"), queries=1)
    assert validation_source(config) is None
    write_classes(tmp_path / "val", classes=2)
    assert validation_source(config).num_classes == 2


def test_training_leaves_out_classes_too_small_for_its_tasks(tmp_path):
    write_classes(tmp_path / "train", classes=4, images=3)
    write(tmp_path / "train" / "lone" / "1.png", 1)
    config = TrainConfig(
        "maml", f"images:{tmp_path}", str(tmp_path / "out"), ways=2, queries=2, eval_every=0
    )
    with pytest.warns(UserWarning, match=r"1 of 5 classes .* fewer than 3 images .*: lone \(1\)"):
        source, _ = training_sources(config, None)
    assert source.class_names == [f"class{c}" for c in range(4)]


def test_own_images_from_training_to_evaluation(tmp_path, capsys):
    generator = np.random.default_rng(0)
    for split, classes in (("train", 6), ("test", 4)):
        for c in range(classes):
            for i in range(4):
                folder = tmp_path / split / f"class{c}"
                folder.mkdir(parents=True, exist_ok=True)
                noise = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{i}.png")
    out = tmp_path / "run"
    options = f"--data images:{tmp_path}@16 --ways 3 --queries 2 --meta-batch 2 --hidden 4"
    command = f"train maml {options} --iterations 2 --out {out}"
    assert cli.main(command.split()) == 0
    assert cli.main(["eval", str(out), "--tasks", "4"]) == 0
    assert (
        "MAML on images, 3-way 1-shot, inner steps 1, 4 evaluation tasks" in capsys.readouterr().out
    )
