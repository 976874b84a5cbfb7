"""Images a second from a folder, from tar shards and by the webdataset package, in one process.

    python -m benchmarks.reading --data_path /photos                             # decoded, from the page cache
    python -m benchmarks.reading --data_path /photos --cold --num_images 20000    # bytes, from disk; as root on Linux

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

from common import cli
from data.datasets import DataError, ImageFolder
from data.order import block_order, full_order
from data.shards import ShardDataset

SHARD_SIZE = 1000  # images
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def parse_args(argv=None):
    parser = cli.build_parser("reading.py", __doc__)
    parser.add_argument("--data_path", required=True, metavar="DIR", help="folder of images")
    parser.add_argument("--num_images", type=cli.positive_int, default=2000, help="images in the copies")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each turn, and do not decode")
    parser.add_argument("--images_per_turn", type=cli.positive_int, default=256, help="images of a row in each turn")
    parser.add_argument("--runs", type=cli.positive_int, default=10, help="turns")
    args = parser.parse_args(argv)
    if args.cold and not os.access(DROP_CACHES, os.W_OK):
        parser.error(f"--cold needs to write to {DROP_CACHES}: run it as root, on Linux")
    return args


def copy_images(images, root, num_images):
    """Write images to root/folder/CLASS/ and, with their classes, to root/shards/ in WebDataset layout."""
    (root / "shards").mkdir()
    for start in range(0, num_images, SHARD_SIZE):
        with tarfile.open(root / "shards" / f"{start // SHARD_SIZE:05}.tar", "w") as shard:
            for i in range(start, min(start + SHARD_SIZE, num_images)):
                path, label = Path(images.name(i % len(images))), f"{images.labels[i % len(images)]:05}"
                copy = root / "folder" / label / f"{i:09}{path.suffix.lower()}"
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
                shard.add(copy, copy.name)
                member = tarfile.TarInfo(f"{i:09}.cls")
                member.size = len(label)
                shard.addfile(member, io.BytesIO(label.encode()))


def build_rows(root, decode):
    """{row: iterator over images, decoded or as bytes}."""
    folder = ImageFolder(str(root / "folder"))
    shards = ShardDataset([str(root / "shards")], cache_dir=str(root / "cache"))

    def read(images, order):
        load = images.__getitem__ if decode else lambda i: (
            images.read_content(*images.find(i)) if images is shards else Path(images.name(i)).read_bytes())
        for epoch in itertools.count():
            for start in range(0, len(images), SHARD_SIZE):
                positions = np.arange(start, min(start + SHARD_SIZE, len(images)))
                yield from map(load, order(positions, len(images), 0, epoch).tolist())

    rows = {"folder": read(folder, full_order), "shards": read(shards, full_order),
            "shards, blocks": read(shards, block_order), "shards, in order": read(shards, lambda x, *_: x)}
    if importlib.util.find_spec("webdataset"):
        import webdataset

        paths = sorted(map(str, (root / "shards").iterdir()))
        samples = webdataset.WebDataset(paths, shardshuffle=len(paths)).shuffle(SHARD_SIZE)
        rows["webdataset"] = iter((samples.decode("pilrgb") if decode else samples)
                                  .to_tuple("jpg;jpeg;png;webp", "cls").repeat())
    return rows


def count_read_bytes():
    """Bytes that this process has read from disks; 0 if unknown."""
    try:
        return int(Path("/proc/self/io").read_text().partition("\nread_bytes:")[2].split()[0])
    except OSError:
        return 0


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        copy_images(ImageFolder(args.data_path), root := Path(folder), args.num_images)
        size = sum(path.stat().st_size for path in root.glob("folder/*/*")) / args.num_images
        rows = build_rows(root, decode=not args.cold)
        seconds, read = {name: [] for name in rows}, dict.fromkeys(rows, 0)
        for _ in range(args.runs):
            for name, images in rows.items():
                if args.cold:
                    os.sync()
                    DROP_CACHES.write_text("3")
                before, start = count_read_bytes(), time.perf_counter()
                for _ in itertools.islice(images, args.images_per_turn):
                    pass
                seconds[name].append(time.perf_counter() - start)
                read[name] += count_read_bytes() - before
    line = "{:20s}{:>10s}{:>10s}{:>10s}{:>10s}{:>15s}"
    print(f"{args.num_images:,} images of {size / 1000:.0f} kB, {'bytes from the disk' if args.cold else 'decoded'}",
          line.format("", "images/s", "min", "max", "ratio", "kB read/image"), sep="\n", file=sys.stderr)
    for name, values in seconds.items():
        rates = sorted(args.images_per_turn / value for value in values)
        record = dict(images_per_sec=statistics.median(rates), min=rates[0], max=rates[-1],
                      ratio=statistics.median(a / b for a, b in zip(seconds["folder"], values)),
                      kb_per_image=read[name] / 1000 / args.images_per_turn / args.runs)
        print(json.dumps(dict(row=name, cold=args.cold) | record), flush=True)
        cells = (format(value, ".2f" if key == "ratio" else ".0f") for key, value in record.items())
        print(line.format(name, *cells), file=sys.stderr)


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError)
