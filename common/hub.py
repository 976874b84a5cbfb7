"""Weights by name: the published ones of the paper, and those in repositories of the Hugging Face Hub.

    is_remote("dino_vits16")                            # and hf:USER/NAME; not where a file or folder has that name
    path = download_weights("hf:USER/NAME", log=print)  # in the cache of huggingface_hub, or of torch.hub
"""

import contextlib
import os

from backbones import download_published, is_published
from common.checkpoint import CheckpointError
from common.files import first_line, hash_file

WEIGHT_FILES = "teacher.safetensors", "model.safetensors", "pytorch_model.bin"  # of a run, of transformers: in a folder


def is_remote(path):
    """Whether --ckpt or --init names published weights (dino_vits16) or hf:USER/NAME, and no file or folder here."""
    return (is_published(str(path)) or str(path).startswith("hf:")) and not os.path.exists(path)


def absolute_path(path):
    """Path of --ckpt or --init as valid from any folder; a name of `is_remote` stays."""
    return path if is_remote(path) else os.path.abspath(path)


def download_weights(name, log):
    """Path of the weights of a name of `is_remote`, in a cache, to which they are downloaded unless they are there.

    Args:
        log: called with the path and the SHA-256.

    Raises:
        OSError: published weights cannot be downloaded.
        CheckpointError: there is no such repository, it holds no model file, or the Hub cannot be reached.
    """
    return download_published(name, log) if is_published(name) else download_repository(name, log)


def download_repository(name, log):
    """`download_weights` of hf:USER/NAME."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repository, problem = name.removeprefix("hf:"), None
    try:
        HfApi().model_info(repository)  # hf_hub_download would ask six times for each file
    except Exception as error:  # of its HTTP library; what is in the cache can be read nevertheless
        problem = first_line(error)
    for file in WEIGHT_FILES:
        try:
            path = hf_hub_download(repository, file, local_files_only=bool(problem))
            with contextlib.suppress(EntryNotFoundError):  # config.json is not in every repository
                hf_hub_download(repository, "config.json", local_files_only=bool(problem))
            log(f"{path}: SHA-256 {hash_file(path)}")
            return path
        except EntryNotFoundError:
            continue
        except Exception as error:
            problem = first_line(error)
            break
    raise CheckpointError(f"{name}: cannot be read from the Hugging Face Hub or its cache "
                          f"({problem or 'no ' + ', '.join(WEIGHT_FILES)})")
