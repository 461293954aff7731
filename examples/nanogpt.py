"""A GPT written out in this file, through torch.compile(model, backend=qpass): what was found in it, and what became of it.

python examples/nanogpt.py [--recipe int8] [--inner inductor]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qpass

VOCABULARY, CONTEXT, WIDTH, HEADS, BLOCKS = 512, 64, 128, 4, 4


class Block(nn.Module):
    """Attention and feed-forward network, each behind a norm, each added to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.c_fc, self.c_out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, HEADS, -1).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).split(WIDTH, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    """Token and position tables, blocks, and a vocabulary projection that is the token table once more."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02 / (2 * BLOCKS) ** 0.5 if "c_proj" in name or "c_out" in name else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--inner", default="eager", help="what compiles the rest: inductor starts slowly and runs fast")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = GPT().eval()
    ids = torch.randint(VOCABULARY, (2, CONTEXT))
    compiled = torch.compile(model, backend=qpass, options={"recipe": args.recipe, "strict": True, "inner": args.inner})
    exact, logits = model(ids), compiled(ids)
    print(qpass.report(compiled), "\n")
    print(qpass.diff(compiled), "\n")
    print(f"largest difference of the logits: {(logits - exact).abs().max():.2e}, of {exact.abs().max():.2f}")
    print(qpass.evaluate(compiled, model, [ids]), "(random weights: a trained model tells more)")


if __name__ == "__main__":
    main()
