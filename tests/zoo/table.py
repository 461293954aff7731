"""docs/architectures.md: what became of every architecture, for a user to look up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import transformers

from tests.zoo.check import Outcome

#: Architectures that do not pass, and why; the zoo fails for any other, and for one of these that passes.
KNOWN = {
    "BltForCausalLM": "its four parts do not fit together in a config with every size made small: not built",
    "CsmDepthDecoderForCausalLM": "a head for each codebook, picked from a 3-D weight by a tensor and then by a number: stays "
    "in float, with that reason",
    "Gemma4AssistantForCausalLM": "its own config class refuses its defaults: not built",
    "Gemma4UnifiedAssistantForCausalLM": "its own config class refuses its defaults: not built",
    "Qwen4ExpForCausalLM": "a graph break in its sparse attention; in the pieces a linear of its linear-attention layers is "
    "taken for feed-forward (quantized all the same)",
}
_KINDS = ("embedding", "qkv", "attn_out", "ffn", "vocab", "linear", "kv")


def write_table(outcomes: Sequence[Outcome]) -> str:
    """The page, as Markdown."""
    causal = [o for o in outcomes if o.name.endswith("ForCausalLM")]
    passed = sum(o.passed for o in causal)
    lines = [
        "# Architectures",
        "",
        f"Every `*ForCausalLM` class of transformers {transformers.__version__} and some others, as a tiny random model with",
        f"int8 at every site (torch {torch.__version__.split('+')[0]}). {passed} of {len(causal)} causal classes pass.",
        "`make zoo` writes this page.",
        "",
        "An architecture passes if each of its matrices is quantized under the kind that its name tells (qpass itself looks at",
        "no names), or stays in float with a reason that is right; if its logits are those of the float model with the same",
        "weights rounded in place (largest difference below 1e-3 of the largest logit); and if qpass adds no graph break.",
        "",
        "`error`: that difference. `KL`: of the next-token distribution, against the unquantized model: a random model says",
        "little about loss. `graphs`: captured graphs. The numbers under the kinds count quantized Parameters (a tied table",
        "counts as embedding); `kv` counts attentions that read a quantized cache.",
        "",
        f"| class | {' | '.join(_KINDS)} | graphs | error | KL | cache | in float |",
        f"|---|{'---:|' * (len(_KINDS) + 3)}---|---|",
    ]
    lines += [_row(o) for o in outcomes if o.passed]
    lines += ["", "## Architectures that do not pass", ""]
    lines += [f"- `{o.name}`: {KNOWN.get(o.name, o.cause)}" for o in outcomes if not o.passed]
    return "\n".join(lines) + "\n"


def _row(o: Outcome) -> str:
    counts: Counter[str] = Counter()
    for kind, n in o.sites.items():
        counts[kind.split("+")[0]] += n
    cells = [str(counts[kind] or "") for kind in _KINDS]
    cache = {"int8": "quantized", "": "none"}.get(o.cache, _short(o.cache))
    reasons = Counter(_short(reason) for kind, _, reason in o.skipped if kind != "kv")
    left = "; ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    return f"| {o.name} | {' | '.join(cells)} | {o.graphs} | {o.error:.0e} | {o.kl:.0e} | {cache} | {left} |"


def _short(reason: str) -> str:
    """A reason up to its first colon or semicolon, for a cell of a table."""
    text = reason.removeprefix("KVCache: ").split(";")[0].replace("|", "\\|")
    head, _, rest = text.partition(": ")
    return rest if head in ("in no captured graph", "adapter") else head[:90]
