"""What a session needs to run an exported file as it was made, as JSON beside it, and a loader that applies it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qpass.errors import QpassError
from qpass_export.targets import Target

#: The model of a folder, and what lies beside it.
MODEL, SESSION = "model.onnx", "session.json"
#: MatMulNBits rounds activations to int8 unless told that they stay float (level 1).
ACCURACY = "session.qdq_matmulnbits_accuracy_level"
_FLOAT = "1"


def write_session(folder: Path, model: str, target: Target) -> None:
    """File, target, provider and options of the session, beside the model."""
    content = {"model": model, "target": target.name, "provider": target.provider, "options": dict(target.options)}
    session_file(folder / model).write_text(json.dumps(content, indent=1) + "\n")


def session_file(model: Path) -> Path:
    """Of model.onnx session.json; of another file a name that begins as its own."""
    return model.with_name(SESSION if model.name == MODEL else f"{model.stem}.{SESSION}")


def load(path: str | Path, provider: str | None = None, exact: bool = False, threads: int | None = None) -> Any:
    """An onnxruntime.InferenceSession of an exported folder or file, with the options that its target needs.

    `provider`: another than the target's. `exact`: products with float activations (slower), not rounded to int8. Raises
    `QpassError` if the provider is not there or is not the one that runs: onnxruntime by itself goes on on the CPU.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise QpassError("onnxruntime is not installed: pip install 'qpass-torch[ort-cpu]', or [ort-gpu]") from None
    file = Path(path) / MODEL if Path(path).is_dir() else Path(path)
    if not session_file(file).is_file():
        raise QpassError(
            f"{path}: no {session_file(file).name} there; qpass_export.load opens what export_onnx has written"
        )
    content = json.loads(session_file(file).read_text())
    wanted = provider or content["provider"]
    if wanted not in ort.get_available_providers():
        raise QpassError(
            f"{path}: made for {content['target']}, but this onnxruntime has no {wanted}, only "
            f"{', '.join(ort.get_available_providers())}; install the build that has it, or export for another target"
        )
    options = ort.SessionOptions()
    for key, value in content["options"].items():
        options.add_session_config_entry(key, value)
    if exact:
        options.add_session_config_entry(ACCURACY, _FLOAT)
    if threads is not None:
        options.intra_op_num_threads = threads
    source: str | bytes = str(file)
    if exact:
        source = _with_float_inputs(file)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
    session = ort.InferenceSession(source, options, providers=[wanted])
    if session.get_providers()[0] != wanted:
        raise QpassError(
            f"{path}: {wanted} could not be started, onnxruntime runs {session.get_providers()[0]} instead"
        )
    return session


def _with_float_inputs(file: Path) -> bytes:
    """The model with every MatMulNBits told that its input stays float."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = int(_FLOAT)
    content: bytes = model.SerializeToString()
    return content
