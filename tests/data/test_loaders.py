import gc
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from augment import BatchMultiCrop, MultiCrop
from common.cli import explain_runtime_error, run_command
from data import loaders
from data.datasets import ImageFolder, read_reduced
from data.loaders import (
    MultiCropDataset,
    build_eval_loader,
    build_train_loader,
    center_crop_view,
    iter_batch_keys,
    iter_on_device,
)
from data.order import derive_seed
from data.shapes import Shapes
from data.workers import DataLoader


@pytest.mark.parametrize("shuffle", ["full", "blocks", "randperm"])
def test_the_images_of_a_step_do_not_depend_on_how_it_is_divided(shuffle):
    def images_of(batch, accum, world_size):
        ranks = [list(iter_batch_keys(0, 9, 50, 0, batch, accum, rank, world_size, shuffle))
                 for rank in range(world_size)]
        return [sorted(key for rank in ranks for part in rank[step * accum:(step + 1) * accum] for key in part)
                for step in range(9)]

    whole = images_of(12, 1, 1)
    assert whole == images_of(3, 1, 4) == images_of(3, 2, 2)
    assert len({index for _, index in sum(whole[:4], [])}) == 48  # an epoch shows no image twice
    assert whole[0] != whole[4] and {epoch for epoch, _ in whole[4]} == {1}
    assert list(iter_batch_keys(5, 9, 50, 0, 12, shuffle=shuffle)) == \
        list(iter_batch_keys(0, 9, 50, 0, 12, shuffle=shuffle))[5:]


def test_blocks_are_read_in_order():
    """Of 192 blocks of 1,024 images, 64 are mixed, and each is read from front to back, around its end."""
    images, by_block = 192 * 1024, {}
    for _, index in next(iter_batch_keys(0, 1, images, 0, 64 * 20, shuffle="blocks")):
        index = (index - derive_seed("order", 0, 0)) % images  # where the first block begins
        by_block.setdefault(index // 1024, []).append(index % 1024)
    steps = {(b - a) % 1024 for indices in by_block.values() for a, b in zip(indices, indices[1:])}
    assert len(by_block) == 64 and steps == {1}


def test_crops_depend_on_seed_epoch_and_index_only():
    images, multicrop = Shapes("train", 20, 32), MultiCrop(32, (0.4, 1), 16, (0.1, 0.4), 2)
    one, again = MultiCropDataset(images, multicrop, seed=0), MultiCropDataset(images, multicrop, seed=0)
    one[0, 3], one[0, 5]  # what was drawn before does not matter
    assert all(map(torch.equal, one[1, 7][0], again[1, 7][0]))
    for other in (again[2, 7], again[1, 8], MultiCropDataset(images, multicrop, seed=1)[1, 7]):
        assert not torch.equal(one[1, 7][0][0], other[0][0])


def test_crops_from_workers_and_in_batches_are_the_same(tmp_path, scene):
    """Files of several sizes and a corrupt one through two workers."""
    for i in range(8):
        scene.resize((40 + 11 * i, 90 - 6 * i)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"bad")
    images, arguments = ImageFolder(str(tmp_path)), (32, (0.4, 1), 16, (0.1, 0.4), 2)
    keys = list(iter_batch_keys(0, 4, 8, 0, 4))
    made = []
    for multicrop in (MultiCrop(*arguments), BatchMultiCrop(*arguments)):
        loader = build_train_loader(images, multicrop, keys, seed=0, num_workers=2)
        made.append(list(iter_on_device(loader, multicrop, torch.device("cpu"))))
    assert len(made[0]) == len(made[1]) == 4
    for (views, labels, messages), (expected, expected_labels, expected_messages) in zip(*made):
        assert messages == expected_messages and torch.equal(labels, expected_labels)
        assert [x.shape for x in views] == [x.shape for x in expected] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 2
        assert all((a - b).abs().mean() < 2e-3 for a, b in zip(views, expected))
    assert sum(len(messages) for *_, messages in made[0]) == 2 and "3.png" in str(made[0])


@pytest.mark.parametrize("kind", [MultiCrop, BatchMultiCrop])
def test_labels_are_those_of_the_images(tmp_path, kind):
    """The color of each image is its class, also of the one that takes the place of a corrupt one."""
    for i in range(12):
        (tmp_path / f"{i % 3}").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), tuple(255 * (i % 3 == channel) for channel in range(3))).save(
            tmp_path / f"{i % 3}" / f"{i:02}.png")
    (tmp_path / "0" / "09.png").write_bytes(b"bad")  # the last of its class: the next is another's
    tree = ImageFolder(str(tmp_path))
    multicrop = kind(16, (0.4, 1), 8, (0.1, 0.4), 0, jitter=0, grayscale=0, blur=(0, 0, 0), global_number=1)
    for images, zeros in ((tree, 6), (torch.utils.data.Subset(tree, list(range(11, -1, -1))), 8)):
        seen = []
        loader = build_train_loader(images, multicrop, iter_batch_keys(0, 6, 12, 0, 4), seed=0)
        for (views,), labels, _ in iter_on_device(loader, multicrop, torch.device("cpu")):
            assert views.shape == (4, 3, 16, 16)
            assert torch.equal(views.mean(dim=(2, 3)).argmax(dim=1), labels)
            seen += labels.tolist()
        assert len(seen) == 24 and set(seen) == {0, 1, 2} and seen.count(0) == zeros


def test_subsets_of_a_folder_are_reduced_while_decoding_too(tmp_path, scene):
    scene.resize((970, 610)).save(tmp_path / "a.jpg")
    tree = ImageFolder(str(tmp_path))
    part = torch.utils.data.Subset(torch.utils.data.Subset(tree, [0]), [0])
    multicrop = MultiCrop(8, (0.4, 1), 4, (0.1, 0.4), 2)
    one, two = (read_reduced(images, 0, multicrop.reduction)[0] for images in (tree, part))
    assert one.size == two.size and one.width < 970 and one.tobytes() == two.tobytes()
    assert two.tobytes() != tree[0][0].reduce(970 // one.width).tobytes()  # a JPEG is not decoded at full size


def test_large_images_are_reduced_from_any_dataset(tmp_path, scene):
    multicrop = MultiCrop(8, (0.4, 1), 4, (0.1, 0.4), 2)
    multicrop.reduction = lambda width, height: 4 if (width, height) == (970, 610) else 1
    scene.resize((970, 610)).save(tmp_path / "a.png")
    tree = ImageFolder(str(tmp_path))
    (one, _), (two, _) = (read_reduced(images, 0, multicrop.reduction) for images in (tree, [tree[0]]))
    assert one.size == two.size == (243, 153) and one.tobytes() == two.tobytes() == tree[0][0].reduce(4).tobytes()


def test_a_disk_that_vanishes_ends_the_run(monkeypatch):
    class Gone:
        def __len__(self):
            return 10**6

        def __getitem__(self, i):
            tried.append(i)
            raise OSError(f"{i}.jpg: gone")

    tried = []
    monkeypatch.setattr(loaders, "MAX_CORRUPT_IN_A_ROW", 5)
    with pytest.raises(OSError, match="5 images in a row cannot be read; the last: 11.jpg: gone"):
        MultiCropDataset(Gone(), MultiCrop(8, (0.4, 1), 4, (0.1, 0.4), 2), seed=0)[0, 7]
    assert tried == [7, 8, 9, 10, 11]


def test_the_evaluation_view_is_that_of_imagenet(scene):
    resized = TF.center_crop(TF.resize(scene, 64, TF.InterpolationMode.BICUBIC), [56, 56])
    expected = TF.normalize(TF.to_tensor(resized), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(center_crop_view(scene, 56), expected, rtol=0, atol=1e-6)
    as_is = TF.normalize(TF.to_tensor(scene), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(center_crop_view(scene, (61, 97)), as_is, rtol=0, atol=1e-6)
    assert center_crop_view(Image.new("RGB", (500, 3)), 32).shape == (3, 32, 32)


def test_ranks_share_the_images_and_skip_corrupt_ones(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("RGB", (20, 10)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "b" / "3.png").write_bytes(b"bad")
    images, seen, bad = ImageFolder(str(tmp_path)), [], []
    for rank in range(3):
        for views, labels, indices, corrupt in build_eval_loader(images, 8, 2, rank=rank, world_size=3):
            assert len(views) == len(labels) == len(indices)
            seen += indices.tolist()
            bad += corrupt
    assert sorted(seen) == [i for i in range(10) if i != 8] and len(bad) == 1 and "3.png" in bad[0]


class LimitedShapes(Shapes):
    """Shapes whose worker can create files of 16 KB at most, in shared memory too."""

    def __getitem__(self, i):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, resource.RLIM_INFINITY))
        return super().__getitem__(i)


@pytest.fixture
def limit_time():
    """Fail after a minute, instead of waiting for ever."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("still waiting for a batch"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_full_shared_memory_is_one_line_and_no_hang(limit_time):
    images = LimitedShapes("train", 8, 64)
    multicrop = MultiCrop(64, local_number=0)
    for loader in (build_train_loader(images, multicrop, [[(0, 0), (0, 1)]], seed=0, num_workers=1),
                   build_eval_loader(images, 64, batch_size=2, num_workers=1)):
        with pytest.raises(RuntimeError, match="file </torch_") as error:
            next(iter(loader))
        assert "larger --shm-size" in explain_runtime_error(error.value)


class SignaledShapes(Shapes):
    """Shapes whose worker gets a signal while it reads the image of this index."""

    def __getitem__(self, i):
        if i == 3:
            os.kill(os.getpid(), self.signal)
        return super().__getitem__(i)


@pytest.mark.parametrize("name, words", [
    ("SIGSTOP", "a data loader worker hangs"), ("SIGKILL", "a data loader worker died")])
def test_a_worker_that_stops_or_dies_is_one_line_and_no_hang(limit_time, capfd, name, words):
    images = SignaledShapes("train", 8, 32)
    images.signal, before = getattr(signal, name), multiprocessing.active_children()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda args: list(build_eval_loader(images, 32, 2, num_workers=1, timeout_minutes=0.02)),
                    lambda: None)
    error = capfd.readouterr().err
    assert stop.value.code == 2 and words in error and "Traceback" not in error
    assert set(multiprocessing.active_children()) <= set(before)


class Collecting(torch.utils.data.Dataset):
    """Collects garbage in the worker, and returns the processes in which the garbage of this one was destroyed."""

    def __len__(self):
        return 1

    def __getitem__(self, i):
        gc.collect()
        return list(Garbage.destroyed_in)


class Garbage:
    """A reference cycle."""

    destroyed_in = []

    def __init__(self):
        self.cycle = self

    def __del__(self):
        Garbage.destroyed_in.append(os.getpid())


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="workers have no garbage of their parent")
def test_workers_leave_the_garbage_of_their_parent_alone():
    """It may wait for threads when it is destroyed, as sessions of onnxruntime do, which a fork does not have."""
    gc.collect()
    gc.disable()
    try:
        Garbage()
        assert list(DataLoader(Collecting(), collate_fn=lambda samples: samples, num_workers=1)) == [[[]]]
    finally:
        gc.enable()
    gc.collect()
    assert Garbage.destroyed_in == [os.getpid()]


def test_workers_do_not_end_on_signals_to_the_job(limit_time):
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        images = SignaledShapes("train", 8, 32)
        images.signal = getattr(signal, name)
        loader = build_eval_loader(images, 32, 2, num_workers=1)
        assert [indices.tolist() for _, _, indices, _ in loader] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_few_file_descriptors_are_named(limit_time):
    limits, probe = resource.getrlimit(resource.RLIMIT_NOFILE), os.dup(0)
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe + 4, limits[1]))
    try:
        with pytest.raises((OSError, RuntimeError)) as error:
            list(build_eval_loader(Shapes("train", 8, 32), 32, 2, num_workers=2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "too many open files: raise the limit (ulimit -n" in explain_runtime_error(error.value)


FORK_SERVER = """
import multiprocessing, os, signal, subprocess, sys
from data.loaders import build_eval_loader
from data.shapes import Shapes

class Images(Shapes):
    def __getitem__(self, i):
        return super().__getitem__(i)[0], os.getpid()

def workers(loader):
    return {pid for _, labels, *_ in loader for pid in labels.tolist()}

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    loader = build_eval_loader(Images("train", 8, 32), 32, 2, num_workers=2)
    first = workers(loader)
    assert len(first) == 2 and workers(loader) == first, "the workers are not kept"
    for pid in first:
        subprocess.run(["kill", str(pid)])  # from another process, as to the whole job
    assert workers(loader) == first
    print(*first)
    sys.stdout.flush()
    if sys.argv[1:] == ["orphans"]:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["orphans", "ends"])
def test_workers_of_a_fork_server_are_kept_and_end_with_their_parent(tmp_path, how):
    (tmp_path / "script.py").write_text(FORK_SERVER)
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, str(tmp_path / "script.py"), how], capture_output=True, text=True,
                            timeout=120, env=os.environ | {"PYTHONPATH": str(root)})
    assert result.returncode == (-signal.SIGKILL if how == "orphans" else 0), result.stderr
    ended, pids = time.monotonic(), result.stdout.split()
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() - ended < 30, "an orphaned worker does not end"
        time.sleep(0.1)
    assert len(pids) == 2
