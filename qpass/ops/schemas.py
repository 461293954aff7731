"""Schemas of `torch.ops.qpass.*`. A weight is passed as its stored parts and the spec that says how to read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_PARTS = "Tensor {0}data, Tensor? {0}scale, Tensor? {0}zero_point, Tensor? {0}outer_scale"

SCHEMAS = {
    # x [.., K] @ W[N, K]^T + bias -> [.., N] in x's dtype. Before that x becomes x / sqrt(mean(x^2) + eps) * norm * column_scale,
    # so far as they are given; after it y [.., N] becomes gate(first half) * second half, if there is a gate ("silu", "gelu",
    # "gelu_tanh"), and then y + residual.
    "linear": (
        f"(Tensor x, {_PARTS.format('')}, Tensor? bias, str spec, Tensor? norm=None, float? eps=None, "
        "Tensor? column_scale=None, str gate='', Tensor? residual=None) -> Tensor"
    ),
    # Calls of these operators one after another, see ops/row.py: one or two of their results, or an empty one in the place of the
    # second. (Two and no list: Inductor's wrapper in C++ calls operators that give lists through Python.) bundle: of inputs that
    # come before the others, see ops/bundle.py; and what is in it.
    "row": "(Tensor? bundle, Tensor[] inputs, Tensor(a!)[] written, str calls) -> (Tensor, Tensor)",
    "unbundle": "(int number) -> Tensor[]",
    # x [.., K] -> codes, with scale and zero point unless those of a static spec are given. Written out for the compiler, which
    # joins it with what makes x; round_input gives the same as floats in x's dtype.
    "quantize_input": "(Tensor x, Tensor? scale, Tensor? zero_point, str spec) -> Tensor[]",
    "round_input": "(Tensor x, Tensor? scale, Tensor? zero_point, str spec) -> Tensor",
    # The same as linear for an input in codes, with a scale for each row or for all. Many rows are multiplied as integers.
    "integer_linear": (
        f"(Tensor x, Tensor x_scale, Tensor? x_zero_point, {_PARTS.format('')}, Tensor? bias, str spec, "
        "ScalarType dtype) -> Tensor"
    ),
    # x [.., K] as it comes back from blocks with scales of 8 bits, whose types the compiler does not know, in x's dtype
    "round_blocks": "(Tensor x, str spec) -> Tensor",
    # linear of round_blocks(x), where spec says of what. GPUs that multiply such blocks do.
    "block_linear": f"(Tensor x, {_PARTS.format('')}, Tensor? bias, str spec) -> Tensor",
    # x [.., K] and ids, broadcast together, -> [.., N]: each row of x by the expert (N rows of the weight) that ids names for
    # it. Negative ids count from the end; the id `experts` itself is no expert: zeros. It reads ids on the host.
    "experts": f"(Tensor x, Tensor ids, {_PARTS.format('')}, int experts, str spec) -> Tensor",
    # indices [..] -> [.., columns]: gathers stored rows, then dequantizes only those
    "embedding": f"(Tensor indices, {_PARTS.format('')}, int columns, str spec, ScalarType dtype) -> Tensor",
    # [.., K] -> the stored parts that the spec has, in the order data, scale, zero_point, outer_scale. A static spec divides by
    # the scale it is given, which broadcasts to x, and stores none.
    "quantize": "(Tensor x, str spec, Tensor? static_scale=None) -> Tensor[]",
    "dequantize": f"({_PARTS.format('')}, int columns, str spec, ScalarType dtype) -> Tensor",
    # A cache [B, H, S, columns] as floats. Some tokens are there as floats beside their stored form, and are taken from there:
    # `first` [B, H, F, columns] holds tokens 0 .. F-1, `last` [B, H, L, columns] tokens start .. start+L-1; start is [] int64.
    "read_cache": (
        f"({_PARTS.format('')}, int columns, str spec, ScalarType dtype, Tensor? first=None, Tensor? last=None, "
        "Tensor? start=None) -> Tensor"
    ),
    # Scaled dot-product attention that reads a quantized cache. q [B, Hq, Q, D], keys [B, Hk, S, D], values [B, Hk, S, Dv]
    # (stored parts); Hq is a multiple of Hk. mask broadcasts to [B, Hq, Q, S]: bool, or float and added. first and last are
    # those of read_cache. Scores are capped to soft_cap * tanh(score / soft_cap), if it is not 0, before the mask is added;
    # sinks [Hq] are scores that take part in the softmax and have no value.
    "attention": (
        f"(Tensor q, {_PARTS.format('k_')}, str k_spec, {_PARTS.format('v_')}, int v_columns, str v_spec, "
        "Tensor? mask, bool is_causal, float? scale, Tensor? k_first=None, Tensor? v_first=None, Tensor? k_last=None, "
        "Tensor? v_last=None, Tensor? start=None, float soft_cap=0.0, Tensor? sinks=None) -> Tensor"
    ),
    # The next S tokens of a cache: keys and values [B, H, S, *] become codes in the parts [B, H, capacity, *] of k and v, behind
    # the `length` [] tokens that are there, which grows by S. Scales are those of static specs. Gives the length before, [].
    # Refuses to run past the capacity before anything is written.
    "append": (
        "(Tensor(a!)[] k, Tensor(b!)[] v, Tensor(c!) length, Tensor keys, Tensor values, str k_spec, str v_spec, "
        "Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor"
    ),
    # One token of a cache whose last tokens are floats. `floats`: the last of keys and of values [B, H, window + 32, *], then the
    # first of both [B, H, firsts, *]. 32 tokens at a time leave the window, and only then become codes. Gives the first token
    # that is read from the last ones, [].
    "append_residual": (
        "(Tensor(a!)[] k, Tensor(b!)[] v, Tensor(c!)[] floats, Tensor(d!) length, Tensor keys, Tensor values, str k_spec, "
        "str v_spec, Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor"
    ),
    # `append` after rotary embedding of keys and queries: x * cos + (the halves of x exchanged, the first negative) * sin, where
    # cos and sin [B or 1, 1, S, D]. Gives the length before, and queries and keys as they were rotated.
    "append_rotated": (
        "(Tensor(a!)[] k, Tensor(b!)[] v, Tensor(c!) length, Tensor queries, Tensor keys, Tensor values, Tensor cos, Tensor sin, "
        "str k_spec, str v_spec, Tensor? k_scale=None, Tensor? v_scale=None) -> (Tensor, Tensor, Tensor)"
    ),
    # The same for a cache of floats [B, H, capacity, *] and positions [S] that are given. Gives the queries as they were rotated.
    "write_rotated": (
        "(Tensor(a!) k, Tensor(b!) v, Tensor positions, Tensor queries, Tensor keys, Tensor values, Tensor cos, Tensor sin) "
        "-> Tensor"
    ),
    # A copy of x that is made once, whoever reads it.
    "once": "(Tensor x) -> Tensor",
    # Positions length .. length + new - 1 of the next tokens in a cache; refuses to run past its capacity.
    "cache_positions": "(Tensor length, SymInt new, SymInt capacity) -> Tensor",
}

#: What ops/cpu/binding.cpp serves; it hands to Python what it does not: calls unlike any that it has seen.
BOUND = ("linear", "attention", "quantize", "append", "append_residual", "append_rotated", "write_rotated")
SCHEMAS |= {f"{name}_checked": SCHEMAS[name] for name in BOUND}

LIBRARY = torch.library.Library("qpass", "DEF")
for _name, _schema in SCHEMAS.items():
    _tags = [torch.Tag.pt2_compliant_tag]
    if _name == "experts" and hasattr(torch.Tag, "cudagraph_unsafe"):
        _tags.append(torch.Tag.cudagraph_unsafe)
    LIBRARY.define(_name + _schema, tags=_tags)

#: What operators give, whatever the device: those that are registered here.
REFERENCES: dict[str, Callable[..., Any]] = {}


def register(name: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """`reference`: what an operator gives, wherever it has no kernel; `fake`: empty results of the same shapes."""
    REFERENCES[name] = reference
    if name not in BOUND:  # for these ops/cpu chooses by device
        LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qpass::{name}", fake, lib=LIBRARY)
