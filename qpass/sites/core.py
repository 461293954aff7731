"""The data that passes from finding sites to rewriting them. All frozen; Site is pure data and goes into artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, Node

from qpass.graph.vocabulary import writes
from qpass.spec import QuantSpec

#: What a recipe can set, in the order in which data flows. `linear` is a linear layer that is none of the others.
KINDS = ("embedding", "qkv", "attn_out", "ffn", "vocab", "linear", "kv")


@dataclass(frozen=True)
class Site:
    """A place that holds memory: a Parameter, or the KV cache of one attention.

    `kind`: one of KINDS, or "other" for what is no site of a transformer. `name`: the Parameter's name in the model (of a
    cache: of the Parameter that produces K). `roles`: what it serves as; a fused QKV weight has ("q", "k", "v"), a tied
    table ("embedding", "vocab"). `shape`: of the Parameter as the model holds it.
    """

    kind: str
    name: str
    roles: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Match:
    """One graph's view of a site: the node that computes with it and what a rewrite needs to know of that node.

    `weight`: placeholder of the Parameter (None for a cache). `call`: LinearCall, EmbeddingCall or CacheRead.
    """

    site: Site
    node: Node
    weight: Node | None
    call: Any


@dataclass(frozen=True)
class Skip:
    """A site that stays in float, and why. `expected`: nothing the user asked for is missing (strict lets it pass)."""

    site: Site
    reason: str
    expected: bool = False


@dataclass(frozen=True)
class Plan:
    """What is to be done with one graph: each match with its spec; and what is left alone."""

    matches: tuple[Match, ...] = ()
    specs: Mapping[Site, QuantSpec] = field(default_factory=dict)
    skipped: tuple[Skip, ...] = ()


@dataclass(frozen=True)
class Edit:
    """One rewrite: the names of the nodes that went and of those that came."""

    pass_name: str
    site: str
    removed: tuple[str, ...]
    added: tuple[str, ...]


def erase_unused(graph: Graph, node: Node) -> list[Node]:
    """Erase a node that nothing reads any more, and what only it read; inputs, and what writes to memory, stay."""
    removed: dict[Node, None] = {}
    dead = [node]
    while dead:
        n = dead.pop()
        stays = n.users or n in removed or n.op not in ("call_function", "call_method")
        if not stays and not writes(n):
            dead += n.all_input_nodes
            removed[n] = None
            graph.erase_node(n)
    return list(removed)


#: What an earlier rewrite put in the place of a node, in that node's meta.
REPLACED = "qpass_replaced_by"


def current(node: Node) -> Node:
    """What stands in the graph for a node that was matched: an earlier rewrite may have replaced it."""
    while REPLACED in node.meta:
        node = node.meta[REPLACED]
    return node
