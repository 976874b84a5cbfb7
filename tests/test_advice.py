from pathlib import Path

import pytest
from PIL import Image

import train
from advice import advice, usual_side

ROOT = Path(__file__).parents[1]


def sentences(*flags, pictures=50_000, side=32, steps=10_000):
    return advice(train.parse_args([*flags, "--device", "cpu"]), pictures, side, steps)


@pytest.mark.parametrize("recipe, pictures, side, batch", [
    ("demo.txt", 10_000, 32, 32), ("cifar10.txt", 50_000, 32, 64), ("cifar10_gpu.txt", 50_000, 32, 256),
    ("as_released/cifar10.txt", 50_000, 32, 64), ("as_released/imagenette.txt", 9_469, 128, 32),
    ("imagenette.txt", 9_469, 128, 64), ("imagenette_gpu.txt", 9_469, 128, 128),
    ("imagenet_vits16.txt", 1_281_167, 375, 1024), ("imagenet_resnet50.txt", 1_281_167, 375, 512)])
def test_recipes_suit_their_pictures(recipe, pictures, side, batch):
    flags = f"@{ROOT / 'recipes' / recipe}"
    epochs = train.parse_args([flags, "--device", "cpu"]).epochs
    assert sentences(flags, pictures=pictures, side=side, steps=epochs * (pictures // batch)) == []


def test_the_papers_flags_do_not_suit_small_pictures():
    views, prototypes, teacher = sentences(pictures=50_000, side=32, steps=2_000)
    assert "views of 224 pixels only enlarge pictures of 32" in views
    assert "--out_dim 65536 are more prototypes than the 50000 pictures" in prototypes
    assert "--momentum_teacher 0.996 averages over 250 steps, of 2,000" in teacher


@pytest.mark.parametrize("flags, given, words", [
    ("--out_dim 1024", dict(side=150), []), ("--out_dim 1024", dict(side=149), ["enlarge"]),
    ("--out_dim 1024", dict(side=None), []), ("--out_dim 50000", dict(side=224), []),
    ("--out_dim 50001", dict(side=224), ["prototypes"]),
    ("--out_dim 1024 --momentum_teacher 0.995", dict(side=224, steps=2001), []),
    ("--out_dim 1024 --momentum_teacher 0.995", dict(side=224, steps=1999), ["averages over 200 steps"]),
    ("--out_dim 1024 --momentum_teacher 1", dict(side=224), ["averages over"]),
    ("--out_dim 1024 --teacher student", dict(side=224, steps=10), []),
    ("--out_dim 1024 --global_crops_size 64 --local_crops_size 16", dict(side=64), []),
    ("--out_dim 1024 --global_crops_size 48 --local_crops_size 16", dict(side=48), ["9 patches"]),
    ("--out_dim 1024 --arch resnet18 --global_crops_size 32", dict(side=32), [])])
def test_each_sentence_has_its_bound(flags, given, words):
    said = sentences(*flags.split(), **given)
    assert len(said) == len(words) and all(word in sentence for word, sentence in zip(words, said))


def test_what_is_advised_is_not_advised_against():
    for steps in (10, 100, 1000, 5000, 100_000):
        assert sentences("--out_dim", "1024", "--momentum_teacher", "0.99", side=224, steps=steps) == []


class Pictures(list):
    def __getitem__(self, index):
        size = super().__getitem__(index)
        if size is None:
            raise OSError("damaged")
        return Image.new("RGB", size), 0


def test_the_usual_side():
    assert usual_side(Pictures([(30, 40), (90, 50), None, (70, 60)])) == 50
    assert usual_side(Pictures([(8, 8)] * 990 + [(99, 99)] * 10)) == 8
    assert usual_side(Pictures([None, None])) is None and usual_side(Pictures()) is None
