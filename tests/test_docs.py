"""The documentation says what is so: its Python runs, its command lines are accepted or run, its links lead somewhere.

The blocks of one page run in order, in one namespace and one folder, as a reader would paste them. The namespace begins with
`model` and `reference` (a small Llama in float), `config`, `tokenizer`, `ids`, `batches` and `texts`; the folder holds `my-model`
(the same model), `calibration.txt`, `validation.txt` and `examples/tinypy`. Comments of the pages steer this:

`<!-- not run: why -->` above a block: it is not run; what it calls `qpass` with is parsed all the same.
`<!-- continues -->` above a Python block: `model` is what the block before made of it; every other block gets a float one.
`<!-- output -->` above a block of text: it is what the Python block before it printed.
A comment `exit status 1` behind a command: it ends so.
"""

from __future__ import annotations

import copy
import io
import re
import shlex
import shutil
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import qpass

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "export/README.md", *sorted((ROOT / "docs").glob("*.md"))]
TINYPY = ROOT / "examples/tinypy"
SHELLS = ("sh", "bash", "console")
#: Blocks that may go without being run, of all pages together.
MOST_NOT_RUN = 3


@dataclass(frozen=True)
class Block:
    """A fenced block: `line` in its page, `note` in the HTML comment above it."""

    page: Path
    line: int
    language: str
    text: str
    note: str

    @property
    def commands(self) -> list[tuple[str, int]]:
        """Lines of a shell block, continued ones joined, without comment; the exit status that a comment names, or 0."""
        lines = [line.partition(" #") for line in self.text.replace("\\\n", " ").splitlines()]
        found = [(line.strip(), re.search(r"exit status (\d)", comment)) for line, _, comment in lines]
        return [(line, int(status[1]) if status else 0) for line, status in found]


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    i, note = 0, ""
    while i < len(lines):
        fence = re.match(r"```(\w*)$", lines[i])
        if fence:
            end = next(j for j in range(i + 1, len(lines)) if lines[j] == "```")
            found.append(Block(page, i + 1, fence[1], "\n".join(lines[i + 1 : end]) + "\n", note))
            i, note = end, ""
        elif lines[i].strip():
            comment = re.match(r"<!-- (.*) -->$", lines[i])
            note = comment[1] if comment else ""
        i += 1
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


RUNNABLE = [
    page
    for page in PAGES
    if any(b.language == "python" or b.language in SHELLS or not b.language for b in blocks_of(page))
]


# --- what the pages find when they run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that each page gets a copy of: two layers of tinypy as `my-model`, a little text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("docs")
    model = AutoModelForCausalLM.from_pretrained(TINYPY, dtype=torch.float32)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers, model.config.max_position_embeddings = 2, 256
    model.save_pretrained(folder / "my-model")
    AutoTokenizer.from_pretrained(TINYPY).save_pretrained(folder / "my-model")
    (folder / "calibration.txt").write_text((TINYPY / "calibration.txt").read_text()[:5_000])
    (folder / "validation.txt").write_text((TINYPY / "validation.txt").read_text()[:8_000])
    return folder


@pytest.fixture
def folder(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of one page."""
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/tinypy").symlink_to(TINYPY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def eager_and_as_shipped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are rewritten, but Inductor does not compile them; products are computed as they are for users."""
    from qpass import backend, formats
    from qpass.sites import classify

    compile_inner = backend.compile_inner
    monkeypatch.setattr(
        backend, "compile_inner", lambda gm, inputs, inner, mode: compile_inner(gm, inputs, "eager", None)
    )
    monkeypatch.setattr(classify, "RULES", classify.RULES)  # docs/extending.md adds to both
    rows = dict(formats.FORMATS)
    with qpass.set_compute(None):
        yield
    for added in formats.FORMATS.keys() - rows.keys():
        del formats.FORMATS[added]


def namespace(folder: Path) -> dict[str, Any]:
    """What the Python blocks of a page may use without making it themselves."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "my-model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "my-model")
    text = (folder / "validation.txt").read_text()
    windows = tokenizer(text, return_tensors="pt").input_ids[0, :256].view(4, 1, 64)
    return {
        "__name__": "__page__", "model": model, "reference": copy.deepcopy(model), "config": model.config, "tokenizer": tokenizer,
        "ids": windows[0, :, :16], "batches": list(windows), "texts": [tokenizer.decode(row[0, :48]) for row in windows],
    }  # fmt: skip


def run_python(block: Block, names: dict[str, Any]) -> str:
    """Run a block; -> what it printed. Lines of a traceback are those of the page."""
    if block.note != "continues":
        torch._dynamo.reset()
        names["model"] = copy.deepcopy(names["reference"])
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile("\n" * block.line + block.text, name(block.page), "exec"), names)
    return printed.getvalue()


def run_command(line: str, status: int) -> None:
    """Run `qpass ...` in this process, and expect it to end with `status`."""
    from qpass.cli import main

    printed = io.StringIO()
    with (
        redirect_stdout(printed),
        redirect_stderr(printed),
        warnings.catch_warnings(),
        pytest.raises(SystemExit) as ended,
    ):
        main(shlex.split(line)[1:])
    assert ended.value.code == status, f"{line}\n{printed.getvalue()}"


# --- the tests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_what_a_page_shows_runs(page: Path, folder: Path) -> None:
    names, printed = namespace(folder), ""
    for block in blocks_of(page):
        if block.note.startswith("not run:"):
            continue
        if block.language == "python":
            printed = run_python(block, names)
        elif block.note == "output":
            assert spaced(block.text) == spaced(printed), f"{name(page)}:{block.line}"
        elif block.language in SHELLS:
            for line, status in block.commands:
                if line.startswith("qpass "):
                    run_command(line, status)


def spaced(text: str) -> str:
    """Text without differences of trailing blanks and empty lines."""
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def command_lines(page: Path) -> list[str]:
    """Every `qpass ...` and `make ...` of a page: lines of its blocks, and what its sentences quote."""
    found = [line for b in blocks_of(page) if b.language in SHELLS for line, _ in b.commands]
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found += [re.sub(r"\s+", " ", quoted) for quoted in re.findall(r"`([^`]+)`", prose)]
    return [line for line in found if re.match(r"(qpass|make) [a-z]", line)]


@pytest.mark.parametrize("page", [p for p in PAGES if command_lines(p)], ids=name)
def test_command_lines_are_those_that_exist(page: Path) -> None:
    from typer.main import get_command

    from qpass.cli import app

    group = get_command(app)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in command_lines(page):
        program, command, *arguments = shlex.split(line)
        if program == "make":
            assert command in targets, f"{name(page)}: {line}"
        else:
            assert command in group.commands, f"{name(page)}: {line}"
            if arguments:  # `qpass recipes` in a sentence names a command
                group.commands[command].make_context(command, arguments)  # raises for an option that is not there


def test_blocks_that_are_not_run_are_few_and_say_why() -> None:
    left_out = [b for page in PAGES for b in blocks_of(page) if b.note.startswith("not run")]
    assert all(re.match(r"not run: \w+", b.note) for b in left_out)
    assert len(left_out) <= MOST_NOT_RUN, [f"{name(b.page)}:{b.line}" for b in left_out]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_name_a_language_that_is_checked(page: Path) -> None:
    known = {"python", "text", "yaml", "json", *SHELLS}
    assert {b.language for b in blocks_of(page)} <= known


ALL_PAGES = [*PAGES, ROOT / "examples/tinypy/README.md"]


@pytest.mark.parametrize("page", ALL_PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name(page)}: {target}"
        assert linked.is_relative_to(ROOT), f"{name(page)}: {target}"
        assert not anchor or anchor in anchors(linked), f"{name(page)}: {target}"


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=name)
def test_every_page_is_found_from_the_readme(page: Path) -> None:
    assert f"](docs/{page.name}" in (ROOT / "README.md").read_text()


def test_the_readme_names_every_file_of_the_package() -> None:
    """The file map: a module or folder of qpass is named in it, by itself or by a pattern."""
    told = next(b.text for b in blocks_of(ROOT / "README.md") if b.text.startswith("qpass/"))
    columns = [re.split(r"\s{2,}", line.strip())[0] for line in told.splitlines()]
    patterns = [re.escape(word.rstrip("/")).replace(r"\*", r"\w*") for column in columns for word in column.split()]
    for path in sorted((ROOT / "qpass").iterdir()):
        if (path.suffix == ".py" and path.stem != "__init__") or (path.is_dir() and (path / "__init__.py").exists()):
            assert any(re.fullmatch(rf"(qpass/)?{p}", path.name) for p in patterns), path.name


def test_the_coverage_excerpt_of_the_readme_is_what_the_report_prints() -> None:
    """A small mixture of experts with random weights: every site, and one that stays in float. Its decibels may differ."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=256,
    )  # fmt: skip
    recipe = qpass.Recipe.uniform("int4:g32:asym", embedding="int8:g32", vocab="int8:g32", kv="int8")
    model = qpass.quantize(Qwen3MoeForCausalLM(config).eval(), recipe)
    model.generate(torch.arange(8)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
    excerpt = next(b.text for b in blocks_of(ROOT / "README.md") if b.text.startswith("kind "))
    printed = spaced(str(qpass.report(model)))
    for line in spaced(excerpt).splitlines():
        assert undecided(line) in map(undecided, printed.splitlines()), line


def undecided(line: str) -> str:
    """A row of a report without its decibels and the width of its columns."""
    return " ".join(re.sub(r"\d+\.\d( \.\. \d+\.\d)?$", "", line).split())
