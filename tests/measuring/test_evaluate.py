"""evaluate: intervals, limits, kept logits, and a cache that is read as it is stored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qpass
from qpass.cache import CACHE_ARGUMENT
from qpass.errors import QpassError
from qpass.measuring.evaluate import CHUNK, Evaluation
from qpass.measuring.kept_logits import KeptLogits, keep_logits
from qpass.testing import assert_close_to_float
from tests.models import dequantized_copy, hf

IDS = torch.arange(200).remainder(90)[None]


def llama() -> Any:
    """With logits that differ by more than rounding does."""
    torch.manual_seed(0)
    model = hf("LlamaForCausalLM", num_key_value_heads=2, head_dim=32, max_position_embeddings=512).eval()
    with torch.no_grad():
        model.lm_head.weight *= 50
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight *= 10
    return model


def evaluation(**changed: Any) -> Evaluation:
    kls = changed.pop("window_kls", (0.1, 0.2, 0.3))
    error = float(torch.tensor(kls, dtype=torch.float64).std() / math.sqrt(len(kls))) if len(kls) > 1 else math.nan
    fields = {"kl": 0.2, "kl_standard_error": error, "perplexity": 2.0, "reference_perplexity": 1.9, "top1": 0.9,
              "tokens": 30, "compute": {}, "window_kls": kls}  # fmt: skip
    return Evaluation(**(fields | changed))


def test_the_interval_is_that_of_students_t() -> None:
    """Three windows: t(2) = 4.303 standard errors either way, and no KL is below 0."""
    low, high = evaluation().kl_interval
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (low, high) == (0.0, pytest.approx(0.2 + half))
    assert evaluation(window_kls=(0.2,)).kl_interval == (0.2, 0.2)
    many = tuple(0.2 + 0.01 * (-1) ** i for i in range(100))
    assert evaluation(window_kls=many).kl_interval[1] == pytest.approx(0.2 + 1.96 * 0.1 / 99.5, rel=0.06)


@pytest.mark.parametrize(
    ("limits", "broken"),
    [
        ({"max_kl": 0.2}, 0), ({"max_kl": 0.19}, 1), ({"min_top1": 0.9}, 0), ({"min_top1": 0.91}, 1),
        ({"max_kl": 0.1, "min_top1": 1.0}, 2), ({}, 0),
    ],
    ids=str,
)  # fmt: skip
def test_limits(limits: dict[str, float], broken: int) -> None:
    assert len(evaluation().breaches(**limits)) == broken
    assert len(evaluation(kl=math.nan, top1=math.nan).breaches(**limits)) == len(limits), "no number keeps no limit"


@pytest.mark.parametrize("tokens", [100, 128, 200], ids=str)
def test_a_quantized_cache_is_read_as_it_is_stored(tokens: int) -> None:
    """CHUNK tokens at a time through a cache of the recipe's format; also where its window of floats is longer than all of it."""
    reference, model = llama(), qpass.quantize(llama(), qpass.Recipe.uniform("int8", kv="int2"), inner="eager")
    ids = IDS[:, :tokens]
    found = qpass.evaluate(model, reference, [ids])

    def through_cache(ids: Tensor) -> Tensor:
        """In the float graph, which knows nothing of kernels."""
        cache = qpass.KVCache(reference.config, ids.shape[1], format="int2")
        parts = [rounded(p, use_cache=True, **{CACHE_ARGUMENT: cache}).logits for p in ids.split(CHUNK, 1)]
        return torch.cat(parts, 1)

    rounded = dequantized_copy(reference, lambda name: "int8")
    assert found.kl == pytest.approx(qpass.evaluate(through_cache, reference, [ids]).kl, rel=1e-3)
    at_once = qpass.evaluate(lambda ids: model(ids, use_cache=False).logits, reference, [ids])
    differs = abs(found.kl - at_once.kl) > 0.01 * at_once.kl
    assert differs == (tokens > 160), "what is behind the window is read as it is stored, and nothing else"


def test_a_quantized_cache_behind_padding() -> None:
    """What the mask leaves out changes nothing, to the left too."""
    model = qpass.quantize(llama(), qpass.Recipe.uniform("int8", kv="int8"), inner="eager")
    reference = llama()
    alone = qpass.evaluate(model, reference, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}])
    padded = torch.cat([torch.zeros(1, 8, dtype=torch.long), IDS], 1)
    mask = torch.cat([torch.zeros(1, 8, dtype=torch.long), torch.ones_like(IDS)], 1)
    behind = qpass.evaluate(model, reference, [{"input_ids": padded, "attention_mask": mask}])
    assert behind.tokens == alone.tokens
    assert behind.kl == pytest.approx(alone.kl, rel=0.15)


def test_kept_logits_are_those_of_the_model_and_made_once(tmp_path: Path) -> None:
    model, made = llama(), []
    windows = [IDS[:, :7], IDS[:, 20:61]]

    def load() -> Any:
        made.append(1)
        return model

    for _ in range(2):
        kept = keep_logits(tmp_path / "k", "a model", windows, load)
        for window in windows:
            assert torch.equal(kept(window), model(window).logits)
    assert len(made) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["k"]
    with pytest.raises(QpassError, match="another model"):
        keep_logits(tmp_path / "k", "another", windows, load)
    with pytest.raises(QpassError, match="other windows"):
        kept(IDS[:, 3:9])
    (tmp_path / "k").write_bytes(b"something else")
    with pytest.raises(QpassError, match="no kept logits"):
        KeptLogits(tmp_path / "k")


def test_a_model_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def fails() -> Any:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        keep_logits(tmp_path / "k", "a model", [IDS], fails)
    assert not list(tmp_path.iterdir())


def test_the_helper_for_tests_fails_by_numbers() -> None:
    model, reference = qpass.quantize(llama(), "int3:g16", inner="eager"), llama()
    assert assert_close_to_float(model, reference, [IDS], max_kl=10.0, min_top1=0.0, strict=True).tokens == 199
    with pytest.raises(AssertionError, match=r"KL .* is above 1e-09; top-1 .* is below 1"):
        assert_close_to_float(model, reference, [IDS], max_kl=1e-9, min_top1=1.0)
    with pytest.raises(QpassError, match="nothing can fail"):
        assert_close_to_float(model, reference, [IDS])


def test_the_helper_names_what_stays_in_float_against_the_recipe() -> None:
    """A cache that the call brings along in float, though the recipe quantizes it."""
    model = qpass.quantize(llama(), qpass.Recipe.uniform("int8", kv="int8"), inner="eager")
    model(IDS, use_cache=True)
    with pytest.raises(AssertionError, match="stays in float"):
        assert_close_to_float(model, llama(), [IDS], strict=True)
