"""qpass::row: calls of qpass's operators, one after another, as one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from qpass.errors import QpassError
from qpass.ops.bundle import unbundle
from qpass.ops.schemas import SCHEMAS, register

#: Calls that only look at a tensor in another way, with sizes, strides and offset, or as another type of as many bytes.
VIEW, TYPED = "view", "typed"
_GIVES, _HOLDS = "gives", "holds"
_VIEWS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    VIEW: (torch.as_strided, ("Tensor", "int[]", "int[]", "int")),
    TYPED: (lambda x, name: x.view(getattr(torch, name)), ("Tensor", "str")),
}


@dataclass(frozen=True)
class Call:
    """A call of the operator `name` of qpass, VIEW or TYPED, as text "name;argument;..", with all arguments of its schema.

    A tensor is the number of a register. There is one for each tensor in the row's bundle, then for each of its other inputs, for
    each tensor that it writes to, and for each result. Lists are written "1,2", booleans as 0 and 1; what is not given is empty.
    """

    name: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return ";".join([self.name, *map(_written, self.arguments)])


@dataclass(frozen=True)
class Like:
    """A contiguous CPU tensor, as text "uint8,sizes,.."."""

    dtype: str
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> Like:
        """That which looks like `x`."""
        return cls(str(x.dtype).removeprefix("torch."), tuple(x.shape))

    def empty(self) -> Tensor:
        """Such a tensor, without values."""
        return torch.empty(self.sizes, dtype=getattr(torch, self.dtype), device="cpu")

    def __str__(self) -> str:
        return ",".join([self.dtype, *map(str, self.sizes)])


@dataclass(frozen=True)
class Row:
    """Calls, and which registers are given back: one or two. `holds`: what is in the bundle.

    As text "call|call|..|gives;register;register", behind "holds;like;..|" if there is a bundle."""

    calls: tuple[Call, ...]
    gives: tuple[int, ...]
    holds: tuple[Like, ...] = ()

    def __str__(self) -> str:
        holds = [";".join([_HOLDS, *map(str, self.holds)])] if self.holds else []
        return "|".join([*holds, *map(str, self.calls), ";".join([_GIVES, *map(str, self.gives)])])


def renumbered(row: Row, numbers: Sequence[int]) -> Row:
    """With register i in the place of which there is number `numbers[i]`, for the first registers."""

    def new(register: int) -> int:
        return numbers[register] if register < len(numbers) else register

    def of(argument: Any, kind: str) -> Any:
        if "Tensor" not in kind or argument is None:
            return argument
        return tuple(map(new, argument)) if kind == "List[Tensor]" else new(argument)

    calls = (Call(c.name, tuple(map(of, c.arguments, types_of(c.name)))) for c in row.calls)
    return Row(tuple(calls), tuple(map(new, row.gives)), row.holds)


def _written(argument: Any) -> str:
    if argument is None:
        return ""
    if isinstance(argument, Sequence) and not isinstance(argument, str):
        return ",".join(map(str, argument))
    return str(int(argument)) if isinstance(argument, bool) else str(argument)


@cache
def types_of(name: str) -> tuple[str, ...]:
    """The types of the arguments of an operator, as its schema writes them. Raises `QpassError` for one that there is not."""
    if name in _VIEWS:
        return _VIEWS[name][1]
    if name not in SCHEMAS:
        raise QpassError(f"qpass::row: no operator {name!r}")
    arguments = getattr(torch.ops.qpass, name).default._schema.arguments
    return tuple(str(a.type) for a in arguments)


def _read(text: str, kind: str) -> Any:
    """An argument of this type; tensors as the numbers of their registers."""
    if kind.startswith("Optional["):
        return None if not text else _read(text, kind.removeprefix("Optional[").removesuffix("]"))
    if kind in ("List[Tensor]", "int[]"):
        return tuple(int(number) for number in text.split(",")) if text else ()
    read: Callable[[str], Any] = _READ[kind]
    return read(text)


_READ: dict[str, Callable[[str], Any]] = {
    "Tensor": int, "int": int, "float": float, "bool": lambda text: bool(int(text)), "str": str,
}  # fmt: skip


@lru_cache(256)
def parse_row(text: str) -> Row:
    """The row that was written so. Raises `QpassError` for text that is none."""
    try:
        *calls, (gives, *registers) = (part.split(";") for part in text.split("|"))
        held = calls.pop(0)[1:] if calls and calls[0][0] == _HOLDS else []
        likes = (like.split(",") for like in held)
        holds = tuple(Like(dtype, tuple(map(int, sizes))) for dtype, *sizes in likes)
        read = (
            Call(name, tuple(_read(*pair) for pair in zip(arguments, types_of(name), strict=True)))
            for name, *arguments in calls
        )
        row = Row(tuple(read), tuple(map(int, registers)), holds)
    except ValueError as e:
        raise QpassError(f"qpass::row: {text!r} is not written as Call says ({e})") from None
    if gives != _GIVES or len(row.gives) not in (1, 2):
        raise QpassError(f"qpass::row: {text!r} does not end with one or two registers to give")
    return row


def run(bundle: Tensor | None, inputs: list[Tensor], written: list[Tensor], text: str) -> tuple[Tensor, Tensor]:
    """What the row gives; in the place of a second result that it has not, an empty one."""
    return _run(parse_row(text), [*([] if bundle is None else unbundle(int(bundle))), *inputs, *written])


def _fake(bundle: Tensor | None, inputs: list[Tensor], written: list[Tensor], text: str) -> tuple[Tensor, Tensor]:
    row = parse_row(text)
    return _run(row, [*(like.empty() for like in row.holds), *inputs, *written])


def _run(row: Row, registers: list[Tensor]) -> tuple[Tensor, Tensor]:
    for call in row.calls:
        arguments = [_filled(a, kind, registers) for a, kind in zip(call.arguments, types_of(call.name), strict=True)]
        function = _VIEWS[call.name][0] if call.name in _VIEWS else getattr(torch.ops.qpass, call.name)
        result = function(*arguments)
        registers += [result] if isinstance(result, Tensor) else result
    first, *second = (registers[i] for i in row.gives)
    return first, second[0] if second else first.new_empty(0)


def _filled(argument: Any, kind: str, registers: list[Tensor]) -> Any:
    if kind == "List[Tensor]":
        return [registers[i] for i in argument]
    return registers[argument] if "Tensor" in kind and argument is not None else argument


register("row", run, _fake)
