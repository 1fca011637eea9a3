"""A training step on a CPU with our dropout and attention, and with torch's own, in turns.

    python -m benchmarks.training_step [--rounds 9]

Forward and backward pass of a trunk in bf16 where the processor multiplies it (else fp32), random ids, no optimizer:
the demo's packaged MiniLM, which drops a tenth in every layer, and a decoder of SmolLM2's shapes with six of its layers
and random weights, which drops nothing. The figure is the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import AutoModel, LlamaConfig, LlamaModel

from mtserve.demo.run import packaged_trunk
from training.trainer.fit import multiplies_bf16
from training.trainer.on_cpu import OnCpu

SHAPES = ((16, 70), (80, 24), (16, 160), (4, 500))


def trunks() -> dict[str, Any]:
    """Both in training mode."""
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=1000,
    )  # fmt: skip
    return {
        "MiniLM": AutoModel.from_pretrained(packaged_trunk()).train(),
        "6 layers of SmolLM2": LlamaModel(config).train(),
    }


def step(trunk: Any, rows: int, tokens: int, context: AbstractContextManager[Any]) -> float:
    """Seconds of a forward and a backward pass; a tenth of the last row is padding."""
    ids = torch.randint(5, 1000, (rows, tokens))
    mask = torch.ones_like(ids)
    mask[-1, -max(1, tokens // 10) :] = 0
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16()), context:
        loss = trunk(input_ids=ids, attention_mask=mask).last_hidden_state.float().square().mean()
    loss.backward()
    taken = time.perf_counter() - started
    trunk.zero_grad()
    return taken


def main() -> int:
    """Print a line a trunk and shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    sys.stdout.write(f"{'bf16' if multiplies_bf16() else 'fp32'}, {torch.get_num_threads()} threads\n")
    for name, trunk in trunks().items():
        for rows, tokens in SHAPES:
            torchs, ours = [], []
            for _ in range(rounds + 1):
                torchs.append(step(trunk, rows, tokens, nullcontext()))
                ours.append(step(trunk, rows, tokens, OnCpu()))
            each = sorted(theirs / own for theirs, own in zip(torchs[1:], ours[1:], strict=True))
            before, after = (statistics.median(one[1:]) * 1000 for one in (torchs, ours))
            shown = f"{before:.0f} ms with torch's, {after:.0f} with ours: {statistics.median(each):.2f} x as fast"
            sys.stdout.write(f"{name}, {rows} rows of {tokens} tokens: {shown} ({each[0]:.2f} to {each[-1]:.2f})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
