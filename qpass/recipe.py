"""Recipes: which format each kind of site gets. Presets, keyword sites, YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qpass.errors import QpassError, nearest
from qpass.formats import FORMATS
from qpass.granularity import PerTensor, PerTokens
from qpass.spec import QuantSpec, parse_spec

SpecLike = str | QuantSpec | None
#: Sites whose format is that of a weight.
WEIGHT_KINDS = ("embedding", "qkv", "attn_out", "ffn", "vocab", "linear")


@dataclass(frozen=True)
class Recipe:
    """The format of each kind of site; None leaves it in float (and the report says so).

    Specs are given as text (`"int4:g128:asym"`) or as QuantSpec. `kv` sets both halves of the cache, `k` and `v` one each.
    `bits`: so many a weight on average, scales included, are given out: int2 to int8 in groups of 32, with the algorithms of its
    own spec. Who gets more is what calibration says, or without data qpass.bits.
    `overrides`: (name glob, spec) pairs that win over the kinds, the first match first:
    `{"*.layers.0.*": "int8", "lm_head.*": None}`.
    """

    embedding: SpecLike = None
    qkv: SpecLike = None
    attn_out: SpecLike = None
    ffn: SpecLike = None
    vocab: SpecLike = None
    linear: SpecLike = None
    kv: SpecLike = None
    k: SpecLike = None
    v: SpecLike = None
    bits: float | None = None
    overrides: Any = ()

    def __post_init__(self) -> None:
        if self.bits is not None and not (isinstance(self.bits, float | int) and 2.6 <= self.bits <= 8.5):
            raise QpassError(f"recipe: bits={self.bits!r}: a number of bits a weight between 2.6 and 8.5")
        for half, value in zip(("k", "v"), kv_specs(self.k, self.v, self.kv, "recipe: kv"), strict=True):
            object.__setattr__(self, half, value)
        object.__setattr__(self, "kv", None)
        for field in fields(self):
            if field.name in WEIGHT_KINDS:
                object.__setattr__(self, field.name, _weight_spec(getattr(self, field.name), field.name))
            spec = getattr(self, field.name)
            if field.name in WEIGHT_KINDS and self.bits is not None and spec is not None and "hqq" in spec.algorithms:
                raise QpassError(f"recipe: {field.name}: bits are given out as integers; hqq needs a float zero point")
        pairs = self.overrides.items() if isinstance(self.overrides, Mapping) else self.overrides
        object.__setattr__(self, "overrides", tuple((glob, _weight_spec(spec, glob)) for glob, spec in pairs))

    @classmethod
    def uniform(cls, spec: SpecLike, **others: Any) -> Recipe:
        """One spec at every weight site; `others` as in the constructor."""
        return cls(**dict.fromkeys(WEIGHT_KINDS, spec) | others)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """A recipe from a YAML mapping with the constructor's names. Raises `QpassError` for an unknown name."""
        import yaml

        try:
            content = yaml.safe_load(Path(path).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise QpassError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise QpassError(f"{path}: a recipe is a mapping of sites to specs, not {type(content).__name__}")
        return _from_mapping(content, str(path))

    def spec_for(self, kind: str, name: str) -> QuantSpec | None:
        """The spec of a weight site, or None if it stays in float."""
        for glob, spec in self.overrides:
            if fnmatchcase(name, glob):
                return spec
        return getattr(self, kind, None)

    @property
    def weight_specs(self) -> list[QuantSpec]:
        """Every spec that a weight may get."""
        specs = [*(getattr(self, kind) for kind in WEIGHT_KINDS), *(spec for _, spec in self.overrides)]
        return [spec for spec in specs if spec is not None]

    @property
    def kv_specs(self) -> tuple[QuantSpec, QuantSpec] | None:
        """(K's spec, V's spec), or None for a float cache."""
        return None if self.k is None else (self.k, self.v)  # type: ignore[return-value]

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data: what `from_yaml` reads."""
        sites = {f: getattr(self, f) for f in (*WEIGHT_KINDS, "k", "v")}
        data: dict[str, Any] = {name: str(spec) for name, spec in sites.items() if spec is not None}
        if self.bits is not None:
            data["bits"] = self.bits
        if self.overrides:
            data["overrides"] = {glob: None if spec is None else str(spec) for glob, spec in self.overrides}
        return data


#: What a bare format name means for keys and for values: a head is one row of few elements, keys differ by channel, and a code
#: of four bits or fewer a head is too coarse. It is KIVI's layout (Liu et al. 2024); docs/kv-cache.md has the measurements.
KV_FORMATS: dict[str, tuple[str, str]] = {
    name: (f"{name}:t32:zero=float:scale=fp16", f"{name}:g32:zero=float:scale=fp16")
    for name in ("int4", "int3", "int2")
}
#: What "int4" means where there are no groups of tokens.
_SINGLY = "int4:g32:asym:rotated"


def of_single_tokens(spec: QuantSpec) -> QuantSpec:
    """That of keys or of values where tokens come or leave one by one: in a sliding window, the output of an encoder, a layer
    with a state beside its keys, a cache that a module keeps itself, and in ONNX."""
    return parse_spec(_SINGLY) if str(spec) in KV_FORMATS["int4"] else spec


def kv_specs(k: SpecLike, v: SpecLike, both: SpecLike, where: str) -> tuple[QuantSpec | None, QuantSpec | None]:
    """(K's spec, V's spec) of a cache, or (None, None) for floats; `both` stands for a half that is not given.

    Raises `QpassError` for one half alone, and for a format without a scale of its own for each token.
    """
    halves = []
    for i, value in enumerate((k or both, v or both)):
        if isinstance(value, str) and value in KV_FORMATS:
            value = KV_FORMATS[value][i]
        spec = _spec(value, where)
        if spec is not None and (spec.format.scale == "e4m3" or isinstance(spec.granularity, PerTensor)):
            raise QpassError(
                f"{where}: {spec} has one scale for the whole tensor; a token needs its own: int8, int8:static, mxfp8, ..."
            )
        if spec is not None and (spec.activations is not None or spec.range != "minmax"):
            raise QpassError(f"{where}: {spec}: activations and ranges are of linears; a cache has a format, say int8")
        if spec is not None and spec.algorithms:
            raise QpassError(
                f"{where}: {spec}: {spec.algorithms[0]} is for weights; a cache is rounded as it is written"
            )
        if i and spec is not None and isinstance(spec.granularity, PerTokens):
            raise QpassError(
                f"{where}: {spec} for values: scales per channel and group of tokens are for keys; use g32"
            )
        if spec is not None and isinstance(spec.granularity, PerTokens) and spec.granularity.tokens != 32:
            raise QpassError(f"{where}: {spec}: keys are quantized 32 tokens at a time; use t32")
        halves.append(spec)
    if (halves[0] is None) != (halves[1] is None):
        raise QpassError(f"{where}: k and v are one cache; set both, or kv")
    return halves[0], halves[1]


def _weight_spec(value: SpecLike, where: str) -> QuantSpec | None:
    spec = _spec(value, f"recipe: {where}")
    if spec is not None and spec.of_caches_only is not None:
        raise QpassError(f"recipe: {where}: {spec}: {spec.of_caches_only!r} is for the KV cache, not for weights")
    return spec


def _spec(value: SpecLike, where: str) -> QuantSpec | None:
    if value is None or isinstance(value, QuantSpec):
        return value
    if not isinstance(value, str):
        raise QpassError(f"{where}={value!r} is no spec; write a format such as 'int8' or 'int4:g128'")
    try:
        return parse_spec(value)
    except QpassError as error:
        raise QpassError(f"{where}: {error}") from None


#: The formats of int5, int4 and int3 are given out (qpass.bits), and take more bits on average than the name says.
#: KL on a small real model (SmolLM2-135M; benchmarks/accuracy.py): int8 .0014, with a scale for each row .0047; int4 .11,
#: int4:g128 on every matrix .80.
PRESETS: dict[str, Recipe] = {
    "int8": Recipe.uniform("int8:g32:scale=fp16"),
    "fp8": Recipe.uniform("fp8_e4m3"),
    "nf4": Recipe.uniform("nf4", embedding="int8:g32", vocab="int8:g32"),
    "int5": Recipe.uniform("int4:g32:asym", bits=6.1),
    "int4": Recipe.uniform("int4:g32:asym", bits=5.35),
    "int3": Recipe.uniform("int4:g32:asym", bits=4.65),
    "w8a8": Recipe.uniform("int8@int8"),
    "w4a8": Recipe.uniform("int4:g32:asym@int8:g32", embedding="int8:g32", vocab="int8:g32"),
}


#: What a preset is where there are calibration data to choose by.
CALIBRATED: dict[str, Recipe] = {
    **{name: Recipe.uniform("int4:g32:asym:awq:gptq", bits=PRESETS[name].bits) for name in ("int5", "int4", "int3")},
    "w8a8": Recipe.uniform("int8:smooth@int8"),
}


def resolve_recipe(recipe: str | Path | Recipe | Mapping[str, Any], calibrated: bool = False) -> Recipe:
    """A Recipe from what a user gives: a preset name, one spec for every weight, a mapping, a YAML file, or a Recipe. A name or
    spec may be followed by changes: "int4+kv=int8", "int8+vocab=int4:g32+ffn=float".

    `calibrated`: there are data. Raises `QpassError` with the nearest name for what is none of these.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return _from_mapping(recipe, "recipe")
    text = str(recipe)
    if text.endswith((".yaml", ".yml")):
        if not Path(text).is_file():
            raise QpassError(f"recipe file {text} does not exist")
        return Recipe.from_yaml(text)
    name, *changes = text.split("+")
    return _changed(_named(name, calibrated), changes)


def _named(text: str, calibrated: bool) -> Recipe:
    if text in PRESETS:
        return CALIBRATED.get(text, PRESETS[text]) if calibrated else PRESETS[text]
    name = text.partition("@")[0].split(":")[0]
    if name not in FORMATS:
        raise QpassError(f"unknown recipe {text!r}: {nearest(name, {*PRESETS, *FORMATS})}")
    return Recipe.uniform(text)


def _changed(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """With "<site>=<spec>" for each change; "float" for none."""
    known = (*WEIGHT_KINDS, "kv", "k", "v")
    sites: dict[str, Any] = {}
    for change in changes:
        site, _, spec = change.partition("=")
        if site not in known or not spec:
            raise QpassError(
                f"recipe: {change!r} is no change; write +<site>=<spec>, as in int4+kv=int8. {nearest(site, known)}"
            )
        sites[site] = None if spec == "float" else spec
    if "kv" in sites:
        sites = {"k": None, "v": None} | sites
    return replace(recipe, **sites)


def _from_mapping(content: Mapping[str, Any], where: str) -> Recipe:
    known = [f.name for f in fields(Recipe)]
    unknown = [k for k in content if k not in known]
    if unknown:
        raise QpassError(f"{where}: unknown site {unknown[0]!r}: {nearest(str(unknown[0]), known)}")
    return Recipe(**content)
