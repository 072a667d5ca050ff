"""Code that fine-tunes a whole model, and the one line that moves its trunk elsewhere. Nothing else changes, nor do the losses.

    python examples/moving_from_central.py --model MODEL --data notes.txt
    python examples/moving_from_central.py --model MODEL --data notes.txt --trunk JOIN --identity me.key

For equal losses the run is to train as this script does:

    splitfl serve MODEL --trainables full --lr 1e-3 --clip 1 --clipping joint
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from client_ends import SplitModelForCausalLM

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--trunk", help="the join string; without it the whole model is trained here")
parser.add_argument("--identity", help="your key file")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--length", type=int, default=64, help="tokens a row")
args = parser.parse_args()

if args.trunk:
    model = SplitModelForCausalLM.from_pretrained(args.model, trunk=args.trunk, identity=args.identity)
else:
    model = AutoModelForCausalLM.from_pretrained(args.model)

tokenizer = AutoTokenizer.from_pretrained(args.model)
with open(args.data, encoding="utf-8") as file:
    tokens = torch.tensor(tokenizer(file.read(), verbose=False).input_ids)
rows = tokens[: len(tokens) // args.length * args.length].view(-1, args.length)
order = torch.randint(len(rows), (args.steps, 4), generator=torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)

model.train()
for step in range(args.steps):
    batch = rows[order[step]].to(model.device)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"{loss.item():.5f}", flush=True)
if args.trunk:
    model.close()
