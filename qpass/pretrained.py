"""transformers models and tokenizers from folders on this machine: no code that comes with them runs, nothing is random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qpass.errors import QpassError
from qpass.progress import working

#: Nothing is fetched, and no class comes from the folder.
_HERE = {"local_files_only": True, "trust_remote_code": False}


def load_pretrained(folder: str | Path, dtype: str = "auto") -> Any:
    """The model in a folder, of the class that its config names, in evaluation mode; its weights mapped from their files.

    `dtype`: of its floats, a name in torch; "auto": their own. Raises `QpassError` if there is none, if transformers has no such
    class, and for weights that are missing or of other shapes (transformers would make random ones).
    """
    folder = Path(folder)
    check_config(folder)
    transformers = _transformers()
    with _named(folder), working(f"loading {folder}"):
        config = transformers.AutoConfig.from_pretrained(folder, **_HERE)
        model, info = _class_of(config, folder).from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    for what in ("missing_keys", "mismatched_keys"):
        if info.get(what):
            first = sorted(map(str, info[what]))[0]
            raise QpassError(f"{folder}: {what.replace('_', ' ')}: {first}; repair the checkpoint")
    return model.eval()


def check_config(folder: Path) -> None:
    """Raises `QpassError` for a folder without config.json."""
    if not (folder / "config.json").is_file():
        raise QpassError(f"{folder}: no transformers model there (config.json is missing)")


def load_tokenizer(folder: str | Path) -> Any:
    """Raises `QpassError` if the folder has none."""
    with _named(f"{folder}: no tokenizer there"):
        return _transformers().AutoTokenizer.from_pretrained(folder, **_HERE)


def longest_input(folder: str | Path) -> int | None:
    """The tokens that the positions of a model suffice for; None if it does not say. Raises `QpassError` for what is no model."""
    check_config(Path(folder))
    with _named(folder):
        config = _transformers().AutoConfig.from_pretrained(folder, **_HERE).get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise QpassError("transformers is not installed: pip install 'qpass-torch[hf]'") from None
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def _class_of(config: Any, folder: Path) -> Any:
    transformers = _transformers()
    names = getattr(config, "architectures", None) or [""]
    found: Any = getattr(transformers, str(names[0]), None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    raise QpassError(
        f"{folder}: transformers has no class {names[0]!r}; quantize the module: qpass.quantize(model), qpass.save"
    )


@contextmanager
def _named(what: object) -> Iterator[None]:
    """Whatever transformers and safetensors raise of a file becomes one line."""
    try:
        yield
    except QpassError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise QpassError(f"{what}: {first[:300]}") from None
