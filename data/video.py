"""Videos in and out, frame by frame: a file, or a folder of pictures; memory does not grow with their length.

    clip = open_clip("in.mp4")                                  # or a folder
    with Writer("out.mp4", clip.rate) as writer:                # or a folder
        for name, frame in clip.frames:
            writer.write(name, change(frame))

Files need PyAV (pip install av).
"""

import os
import re
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from data.datasets import DataError
from data.images import EXTENSIONS, ImageReadError, read_image

KINDS = (".mp4", ".mov", ".mkv", ".webm")  # of files that are written


class Clip(NamedTuple):
    frames: object  # yields (name, RGB image), or (name, message) for one that cannot be read
    rate: Fraction  # frames a second; None for a folder
    count: int  # of frames; None where the file does not say


def open_video(path):
    """The frames of a video file, upright, or the pictures of a folder in the order of the numbers in their names.

    A video whose rate varies is given out at its average.

    Raises:
        DataError: neither is there.
    """
    if os.path.isdir(path):
        files = [file for file in Path(path).iterdir() if file.name.lower().endswith(EXTENSIONS)
                 and not file.name.startswith(".")]
        if not files:
            raise DataError(f"{path}: no picture in this folder")
        files.sort(key=lambda file: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)])
        return Clip(map(read, files), None, len(files))
    import av

    try:
        container = av.open(path)
        stream = container.streams.video[0]
    except (OSError, ValueError, IndexError) as error:
        what = error.strerror if isinstance(error, OSError) else "no video in it"
        raise DataError(f"{path}: not a video file or a folder of frames ({what})") from None
    stream.thread_type = "AUTO"
    count = stream.frames or (round(container.duration / av.time_base * stream.average_rate)
                              if container.duration and stream.average_rate else None)
    return Clip(decoded(container, stream), stream.average_rate, count)


def read(file):
    try:
        return file.name, read_image(file)
    except ImageReadError as error:
        return file.name, str(error)


def decoded(container, stream):
    """(number, frame) one by one; a part of the stream that is damaged is passed over with a message."""
    import av

    number, packets = 0, container.demux(stream)
    with container:
        while True:
            try:
                for frame in next(packets).decode():
                    image = frame.to_image()
                    yield f"{number:06}", image.rotate(frame.rotation, expand=True) if frame.rotation else image
                    number += 1
            except StopIteration:
                return
            except av.FFmpegError as error:
                yield f"{number:06}", f"{container.name}, after {number} frames: {error.strerror}"


class VideoWriter:
    """Frames into a video file of the kind that its name ends with, or into a folder as PNG under their own names.

    All frames of a file have the size of the first, rounded down to even numbers; others are fitted into it. What was
    written when it is closed can be played.

    Args:
        rate: frames a second of a file.

    Raises:
        DataError: nothing can be written there, or no video of that kind or size.
    """

    def __init__(self, path, rate):
        self.path, self.rate, self.container = Path(path), Fraction(rate).limit_denominator(1001), None
        self.is_folder, self.written = self.path.is_dir() or not self.path.suffix, set()
        if not self.is_folder and self.path.suffix.lower() not in KINDS:
            raise DataError(f"{path}: expected a folder, or a file that ends with {' '.join(KINDS)}")
        if self.is_folder and self.path.exists() and not self.path.is_dir():
            raise DataError(f"{path}: is a file")
        if not self.path.parent.is_dir():
            raise DataError(f"{path}: its folder does not exist")

    def __enter__(self):
        if self.is_folder:
            self.path.mkdir(exist_ok=True)
        return self

    def write(self, name, image):
        if not self.is_folder:
            return self.encode(image)
        stem = Path(name).stem if Path(name).stem not in self.written else name  # of a.jpg and a.png
        self.written.add(stem)
        image.save(self.path / f"{stem}.png", compress_level=1)  # four times as fast

    def encode(self, image):
        import av

        try:
            if self.container is None:
                self.container = av.open(str(self.path), "w")
                self.stream = self.container.add_stream(self.container.default_video_codec, rate=self.rate)
                self.stream.width, self.stream.height = (max(2, side // 2 * 2) for side in image.size)
                self.stream.pix_fmt = "yuv420p"  # what every player shows
            size = self.stream.width, self.stream.height
            if image.size != size:
                image = ImageOps.pad(image, size, Image.Resampling.LANCZOS)
            packets = self.stream.encode(av.VideoFrame.from_image(image))
        except av.FFmpegError as error:
            self.container = None
            raise DataError(f"{self.path}: no video of {image.width} x {image.height} pixels can be written there "
                            f"({error.strerror})") from None
        self.container.mux(packets)

    def __exit__(self, *error):
        if self.container:
            self.container.mux(self.stream.encode())
            self.container.close()
