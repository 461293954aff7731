"""Diffs to look at: of a tiny model, of one with many layers, and one whose every name is hostile."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

import qpass
from qpass.seeing.diff import Diff, GraphDiff, NodeChange, SiteDetail, SiteSide
from tests.models import build, tokens

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "\"'><svg onload=window.hacked=1>",
    "{{ 7*7 }}\u2028${window.hacked=1}",
)


def of_llama() -> Diff:
    """Two layers in int4 with an int8 cache; a prefill and a decode."""
    recipe = qpass.Recipe(embedding="int4:g16", qkv="int4:g16", ffn="int4:g16", vocab="int8", kv="int8")
    model = qpass.quantize(build("llama"), recipe, inner="eager")
    ids = tokens(1, 5)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    return qpass.diff(model)


def with_layers(diff: Diff, layers: int) -> Diff:
    """The same with layer 1 many times over."""
    (first, *_) = diff.graphs
    groups = len(first.groups())

    def again(i: int, text: str) -> str:
        return re.sub(
            r"\blayers([._]modules_|[._])1\b(?!\d)|\blayers_modules_1_", lambda m: m[0].replace("1", str(i)), text
        )

    def node(n: NodeChange, i: int) -> NodeChange:
        group = None if n.group is None else n.group + i * groups
        texts = {f: again(i, getattr(n, f)) for f in ("module", "site", "text", "code")}
        return replace(n, name=f"{n.name}__{i}", group=group, **texts)  # type: ignore[arg-type]

    mine = [n for n in first.nodes if ".layers.1." in f".{n.module}."]
    nodes = [n for n in first.nodes if ".layers.1." not in f".{n.module}."]
    for i in range(1, layers):
        nodes += [node(n, i) for n in mine]
    sites = [s for s in diff.sites if ".layers.1." not in s.name]
    for i in range(1, layers):
        sites += [replace(s, name=again(i, s.name)) for s in diff.sites if ".layers.1." in s.name]
    return Diff((GraphDiff(tuple(nodes)),), tuple(sites), f"{layers} layers")


def hostile() -> Diff:
    """Each name, text, format and reason is an attempt to run a script."""
    nodes, sites = [], []
    for i, name in enumerate(HOSTILE):
        for status in ("removed", "added"):
            nodes.append(
                NodeChange(status, f"{name} {status}", name, name, name, f"{name} -> [1]", name, (f"{name} removed",),
                           f"ffn {name}", i)
            )  # fmt: skip
        nodes.append(NodeChange("kept", f"{name} kept", name, name, name, name, name, (), f"qkv {name}"))
        sites.append(SiteDetail("ffn", name, SiteSide(None, 8, name), SiteSide(name, 4, name, 3.0, None, name)))
        sites.append(SiteDetail("qkv", name, SiteSide(None, 8, name), SiteSide(None, 8, name, None, name, name)))
    return Diff((GraphDiff(tuple(nodes)),), tuple(sites), HOSTILE[0])
