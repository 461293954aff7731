"""Who may import whom, and that importing qpass stays light."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qpass"
#: Layers from the bottom up: a file imports from its own layer and those below.
LAYERS = [
    {
        "errors",
        "ranks",
        "formats",
        "granularity",
        "blocks",
        "packing",
        "quantized",
        "rotation",
        "progress",
        "printing",
        "memory",
        "texts",
        "pretrained",
    },
    {"spec"},
    {"recipe", "numerics", "compute"},
    {"algorithms", "observers"},
    {"graph"},
    {"ops", "weights", "qtensor", "qstate"},
    {"sites", "doctor"},
    {"passes", "store", "ready"},
    {"bundles", "calling", "made_caches", "module_state", "programs", "replay", "structure"},
    {"calibration", "decisions"},
    {"sensitivity"},
    {"bits"},
    {"site_planner"},
    {"backend"},
    {"registry"},
    {"cache", "cache_layers", "seeing", "generate"},
    {"exported", "exported_calibration", "exported_state"},
    {"finish"},
    {"api"},
    {"artifact"},
    {"hf", "folders"},
    {"measuring", "testing"},
    {"planning"},
    {"cli"},
]
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}
#: Of ops/triton: what is compiled for GPUs, and imports triton.
KERNELS = {"unpacking", "around", "linear", "bitstream", "rows", "attention", "quantizing", "appending", "rescaling"}
FILES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE)


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse((PACKAGE / path).read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
    return names | {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_downwards(path: Path) -> None:
    own = path.parts[0].removesuffix(".py")
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "qpass" and len(parts) > 1:
            assert LEVEL[parts[1]] <= LEVEL[own], f"{path} imports {name}"


def test_graph_and_diff_know_torch_only() -> None:
    for path in FILES:
        if path.parts[0] == "graph" or path.name == "diff.py":
            outside = {
                n
                for n in imports(path)
                if n.startswith("qpass") and not n.startswith(("qpass.graph", "qpass.errors", "qpass.seeing.html"))
            }
            assert not outside, path


def test_private_names_of_torch_live_in_one_file() -> None:
    for path in FILES:
        if path.name != "torch_private.py":
            private = {
                n for n in imports(path) if n.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))
            }
            assert not private, path


def test_the_exporter_is_above_and_unknown_to_qpass() -> None:
    for path in FILES:
        assert not {
            n for n in imports(path) if n.split(".")[0] in ("qpass_export", "onnx", "onnx_ir", "onnxruntime")
        }, path


@pytest.mark.parametrize("heavy", ["transformers", "torchao", "triton", "onnx"])
def test_heavy_packages_are_imported_by_their_users_only(heavy: str) -> None:
    users = {str(p) for p in FILES if any(n.split(".")[0] == heavy for n in imports(p, top_level_only=True))}
    if heavy == "triton":
        assert users == {f"ops/triton/{name}.py" for name in KERNELS}
    else:
        assert users <= ({"cache.py", "cache_layers.py"} if heavy == "transformers" else set())


def test_files_of_kernels_are_imported_by_each_other_only() -> None:
    """Everything else asks for them when a kernel is to run."""
    files = {f"qpass.ops.triton.{name}" for name in KERNELS}
    for path in FILES:
        if path.parent.name != "triton" or path.stem not in KERNELS:
            assert not files & imports(path), path
