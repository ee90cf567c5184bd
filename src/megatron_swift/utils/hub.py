"""Model names to local folders: a path, or a download from ModelScope (the default) or Hugging Face."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_swift.utils.errors import UsageError
from megatron_swift.utils.log import get_logger

# What a model needs. No pickled weights, and no code, ever.
PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "LICENSE*"]


def wants_hugging_face(use_hf: bool) -> bool:
    """`--use_hf`, or the environment's USE_HF=1."""
    return use_hf or os.environ.get("USE_HF", "").lower() in ("1", "true", "yes")


def local_model(model: str, *, use_hf: bool = False, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a model: `model` itself when it is one, otherwise the hub's snapshot (cached by the hub's own library).

    Raises UsageError when it is neither a folder nor a name that can be fetched.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.startswith(("/", "./", "../", "~")) or model.count("/") != 1:
        raise UsageError(
            f"--model {model} is not an existing folder", do="give a model's folder or a hub name, owner/name"
        )
    hugging_face = wants_hugging_face(use_hf)
    package = "huggingface_hub" if hugging_face else "modelscope"
    hub = "Hugging Face" if hugging_face else "ModelScope"
    try:
        if hugging_face:
            from huggingface_hub import snapshot_download
        else:
            from modelscope import snapshot_download  # type: ignore
    except ImportError:
        raise UsageError(
            f"--model {model} is not a local folder, and {hub} cannot be asked: the package {package} is not installed",
            do="pip install 'megatron-swift[hub]', or give the model's folder"
            + ("" if hugging_face else ", or add --use_hf true"),
        ) from None
    get_logger().info("model %s: asking %s", model, hub)
    try:
        patterns = {"allow_patterns" if hugging_face else "allow_file_pattern": PATTERNS}
        return Path(str(snapshot_download(model, revision=revision, token=token, **patterns)))  # type: ignore
    except Exception as error:  # the hubs' libraries raise many kinds, all meaning: it cannot be had
        raise UsageError(
            f"--model {model} cannot be fetched from {hub}: {error}",
            do="check the name and the network, or give the model's folder"
            + ("" if hugging_face else ", or add --use_hf true"),
        ) from error
