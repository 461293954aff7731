"""Artifacts under damage that is drawn at random: bits, kills, a full disk. The long form of what test_artifact.py promises."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qpass
from qpass.artifact.manifest import QpassFormatError
from tests.test_artifact import RECIPES, checked, flip, quantized

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.long)])
def test_every_flipped_bit_of_every_format_is_found(count: int, recipe: str, tmp_path: Path) -> None:
    """Anywhere in the files whose bytes matter, each drawn by its size."""
    folder = tmp_path / "a"
    qpass.save(quantized(recipe=recipe), folder, shard_bytes=60_000)
    before = qpass.verify(folder)
    files = checked(folder)
    generator = random.Random(count)
    for path in generator.choices(files, [f.stat().st_size for f in files], k=count):
        at = generator.randrange(path.stat().st_size)
        flip(path, at)
        with pytest.raises(QpassFormatError):
            qpass.verify(folder)
        flip(path, at)
    assert qpass.verify(folder) == before


@pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.long)])
def test_a_save_that_is_killed_at_any_moment_leaves_the_old_or_the_new(count: int, tmp_path: Path) -> None:
    """And the next one no litter."""
    command = [sys.executable, "-m", "tests.save_probe", "kills", str(tmp_path / "a"), str(count)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(out.stdout.splitlines()[-1])
    assert found["left"] == ["a"]
    assert found["killed"] > count / 4
    assert min(found["old"], found["new"]) > count / 20, "both were there"


@pytest.mark.parametrize("spare", [0.5, *(pytest.param(s, marks=pytest.mark.long) for s in (0.1, 0.9, 0.98))])
def test_a_full_disk_leaves_the_old_artifact_and_no_litter(spare: float, tmp_path: Path) -> None:
    """On a file system of its own that has room for the old artifact and a share of the new one."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces on this machine")
    qpass.save(quantized(recipe="int8"), tmp_path / "old", shard_bytes=20_000)
    qpass.save(quantized(recipe="int4:g16"), tmp_path / "new", shard_bytes=20_000)
    page = 4096

    def pages(folder: Path) -> int:
        return sum(-(-f.stat().st_size // page) for f in folder.iterdir())

    size = page * (pages(tmp_path / "old") + int(spare * pages(tmp_path / "new")))
    mounted = tmp_path / "disk"
    mounted.mkdir()
    script = f"mount -t tmpfs -o size={size} tmpfs {mounted} && {sys.executable} -m tests.save_probe fill {mounted}/a"
    out = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(out.stdout.splitlines()[-1])
    assert found == {"failed": "No space left on device", "old": True, "left": ["a"]}
