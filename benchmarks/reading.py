"""Images a second from a folder, from tar shards and by the webdataset package, decoding included, on one core.

    python -m benchmarks.reading --data_path /photos --num_images 10000
    python -m benchmarks.reading --data_path /photos --num_images 10000 --cold     # from the disk; as root, on Linux

The images are copied, again and again if they are too few, to a temporary folder and to shards of 1,000. All rows are
timed in one process and in alternation: compare the ratios. Standard output gets one JSON object per row, standard
error a table.
"""

import importlib.util
import io
import itertools
import json
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from common import cli
from data.datasets import DataError, ImageFolder
from data.order import block_order, full_order
from data.shards import ShardDataset

SHARD_SIZE = 1000
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def parse_args(argv=None):
    parser = cli.build_parser("reading.py", __doc__)
    parser.add_argument("--data_path", required=True, metavar="DIR", help="folder of images")
    parser.add_argument("--num_images", type=cli.positive_int, default=2000, help="images in the copies")
    parser.add_argument("--temporary_dir", metavar="DIR", help="where the copies are made (default: the system's)")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each turn")
    parser.add_argument("--batch_size", type=cli.positive_int, default=256, help="images per turn")
    parser.add_argument("--runs", type=cli.positive_int, default=10, help="turns")
    args = parser.parse_args(argv)
    if args.cold and not os.access(DROP_CACHES, os.W_OK):
        parser.error(f"--cold needs to write to {DROP_CACHES}: run it as root, on Linux")
    return args


def copy_images(images, root, num_images):
    """Write images to root/folder/CLASS/ and, with their classes, to root/shards/ in WebDataset layout."""
    for i in range(num_images):
        path, label = Path(images.name(i % len(images))), images.labels[i % len(images)]
        if i % SHARD_SIZE == 0:
            (root / "shards").mkdir(exist_ok=True)
            shard = tarfile.open(root / "shards" / f"{i // SHARD_SIZE:05}.tar", "w")  # noqa: SIM115
        copy = root / "folder" / f"{label:05}" / f"{i:09}{path.suffix.lower()}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        shard.add(copy, copy.name)
        text = str(label).encode()
        member = tarfile.TarInfo(f"{i:09}.cls")
        member.size = len(text)
        shard.addfile(member, io.BytesIO(text))
        if i % SHARD_SIZE == SHARD_SIZE - 1 or i == num_images - 1:
            shard.close()


def build_rows(root):
    """{row: iterator over decoded images}."""
    folder = ImageFolder(str(root / "folder"))
    shards = ShardDataset([str(root / "shards")], cache_dir=str(root / "cache"))

    def read(images, order):
        for epoch in itertools.count():
            for start in range(0, len(images), SHARD_SIZE):
                positions = np.arange(start, min(start + SHARD_SIZE, len(images)))
                yield from map(images.__getitem__, order(positions, len(images), 0, epoch).tolist())

    rows = {"folder": read(folder, full_order), "folder, blocks": read(folder, block_order),
            "shards": read(shards, full_order), "shards, blocks": read(shards, block_order),
            "shards, in order": read(shards, lambda positions, *_: positions)}
    if importlib.util.find_spec("webdataset"):
        import webdataset

        paths = sorted(map(str, (root / "shards").iterdir()))
        rows["webdataset"] = iter(webdataset.WebDataset(paths, shardshuffle=len(paths)).shuffle(1000).decode("pilrgb")
                                  .to_tuple("jpg;jpeg;png;webp", "cls").repeat())
    return rows


def count_read_bytes():
    """Bytes that this process has read from disks; 0 if unknown."""
    try:
        return int(Path("/proc/self/io").read_text().partition("\nread_bytes:")[2].split()[0])
    except OSError:
        return 0


def main(args):
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    with tempfile.TemporaryDirectory(dir=args.temporary_dir) as root:
        copy_images(ImageFolder(args.data_path), Path(root), args.num_images)
        size = sum(path.stat().st_size for path in Path(root).glob("folder/*/*")) / args.num_images
        rows = build_rows(Path(root))
        seconds, read = {name: [] for name in rows}, dict.fromkeys(rows, 0)
        for _ in range(args.runs):
            for name, images in rows.items():
                if args.cold:
                    os.sync()
                    DROP_CACHES.write_text("3")
                before, start = count_read_bytes(), time.perf_counter()
                for _ in itertools.islice(images, args.batch_size):
                    pass
                seconds[name].append(time.perf_counter() - start)
                read[name] += count_read_bytes() - before
    print(f"{args.num_images} images of {size / 1000:.0f} kB, {'cold' if args.cold else 'warm'}, {args.runs} x "
          f"{args.batch_size}\n{'':20s}  images/s       min       max     ratio  kB read/image", file=sys.stderr)
    for name, values in seconds.items():
        rates = sorted(args.batch_size / value for value in values)
        ratio = statistics.median(a / b for a, b in zip(seconds["folder"], values))
        kb = read[name] / 1000 / args.batch_size / args.runs
        print(json.dumps(dict(row=name, cold=args.cold, images_per_sec=statistics.median(rates), min=rates[0],
                              max=rates[-1], ratio=ratio, kb_per_image=kb)), flush=True)
        print(f"{name:20s}{statistics.median(rates):10.0f}{rates[0]:10.0f}{rates[-1]:10.0f}{ratio:10.2f}{kb:15.0f}",
              file=sys.stderr)


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError)
