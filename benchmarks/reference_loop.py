"""The reference run as a plain training loop over `GPT2LMHeadModel`, with the same recipe.

    python -m benchmarks.reference_loop TEXT OUT SEED

Prints one JSON object: the loss on the whole validation set, and the wall time from the start of the process to the saved
model.
"""

import json
import math
import sys
import time

STARTED = time.time()

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

CONTEXT, BATCH, STEPS, WARMUP, PEAK_LR, MIN_LR = 64, 12, 2000, 100, 1e-3, 1e-4


def learning_rate(step: int) -> float:
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    return MIN_LR + 0.5 * (PEAK_LR - MIN_LR) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def main(path: str, out: str, seed: int) -> None:
    text = open(path, encoding="utf-8").read()  # noqa: PTH123, SIM115
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    data = torch.tensor([ids[character] for character in text])
    train, validation = data[: int(0.9 * len(data))], data[int(0.9 * len(data)) :]
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(ids),
            n_positions=CONTEXT,
            n_embd=128,
            n_layer=4,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    not_decayed = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": not_decayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.99))
    for step in range(STEPS):
        starts = torch.randint(len(train) - CONTEXT, (BATCH,))
        x = torch.stack([train[i : i + CONTEXT] for i in starts])
        y = torch.stack([train[i + 1 : i + 1 + CONTEXT] for i in starts])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        loss = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    total, count = 0.0, 0
    model.eval()
    with torch.inference_mode():
        n = (len(validation) - 1) // CONTEXT
        for rows in torch.arange(n).split(128):
            x = torch.stack([validation[i * CONTEXT : (i + 1) * CONTEXT] for i in rows])
            y = torch.stack([validation[i * CONTEXT + 1 : (i + 1) * CONTEXT + 1] for i in rows])
            total += F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction="sum").item()
            count += y.numel()
    model.save_pretrained(out)
    print(json.dumps({"loss": total / count, "seconds": time.time() - STARTED, "seed": seed}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
