"""transformers' own doors: `from_pretrained` of an artifact, `from_pretrained(..., quantization_config=QpassConfig(...))`,
`save_pretrained`. transformers is not imported here but by whoever uses it; qpass waits for that."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from qpass.api import quantize
from qpass.artifact.load import fill, leave_out
from qpass.artifact.manifest import METHOD
from qpass.artifact.save import save
from qpass.errors import QpassError
from qpass.finish import ON_FINISH

_REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Have transformers know qpass: now, if it is imported, or once it is."""
    ON_FINISH.append(_own_save_pretrained)
    if _REGISTRY in sys.modules:
        _register(sys.modules[_REGISTRY])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself; has the registry of quantizers run `_register` behind its own code."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register(auto: Any) -> None:
    """Tell the registry of quantizers of two classes, which need transformers to exist."""
    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class QpassConfig(QuantizationConfigMixin):
        """`recipe`: of a float checkpoint, which is quantized as it is loaded; an artifact has its own."""

        def __init__(self, recipe: Any = "int8", **_: Any) -> None:
            self.quant_method, self.recipe = METHOD, recipe

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": METHOD}

    class QpassQuantizer(HfQuantizer):
        """Weights of an artifact are put in by qpass, behind transformers' own loading of what is left."""

        is_trainable = False
        is_compileable = True
        _folder: Path | None = None

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return True

        def update_attn_implementation(self, config: Any) -> Any:
            """The first thing that is asked with the config: names the file to look for, where nothing else finds one."""
            if self.pre_quantized:
                config.transformers_weights = "qpass-00001.safetensors"
            return config

        def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
            places = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
            if len(places) > 1 or places & {"auto", "disk"}:
                raise QpassError(
                    "from_pretrained: a qpass artifact is loaded on one device; leave out device_map, then move it"
                )

        def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
            if self.pre_quantized:
                self._folder = Path(checkpoint_files[0]).parent
                leave_out(model, self._folder)

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            del model.hf_quantizer
            model.is_quantized = False
            if self._folder is not None:
                return fill(model, self._folder)
            return quantize(model, self.quantization_config.recipe)

    auto.register_quantization_config(METHOD)(QpassConfig)
    auto.register_quantizer(METHOD)(QpassQuantizer)


def config_class() -> Any:
    """QpassConfig, for `from_pretrained(..., quantization_config=...)`."""
    from transformers.quantizers import auto

    _register(auto)
    return auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD]


def _own_save_pretrained(model: Any) -> None:
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = SavePretrained(model)


class SavePretrained:
    """Stands in for `model.save_pretrained` of a quantized model: transformers would write tensors that it cannot read back."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, save_directory: str | Path, **options: Any) -> None:
        refused = sorted(options.keys() - {"safe_serialization", "max_shard_size", "is_main_process"})
        if refused:
            raise QpassError(
                f"save_pretrained: {refused[0]!r} is not for quantized models; qpass.save(model, folder) writes one"
            )
        if options.get("is_main_process", True):
            save(self.model, save_directory)
