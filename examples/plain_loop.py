"""A plain PyTorch loop over a model whose trunk is elsewhere. Only the line that loads the model is splitfl's.

python examples/plain_loop.py --trunk JOIN --identity me.key --model MODEL --data notes.txt
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoTokenizer

from client_ends import SplitModelForCausalLM

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--trunk", required=True, help="the join string")
parser.add_argument("--identity", required=True, help="your key file")
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True, help="a text file; it never leaves this machine")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--length", type=int, default=128, help="tokens a row")
args = parser.parse_args()

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(args.model)
with open(args.data, encoding="utf-8") as file:
    tokens = torch.tensor(tokenizer(file.read(), verbose=False).input_ids)
rows = tokens[: len(tokens) // args.length * args.length].view(-1, args.length)

model = SplitModelForCausalLM.from_pretrained(args.model, trunk=args.trunk, identity=args.identity)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

model.train()
for step in range(args.steps):
    batch = rows[torch.randint(len(rows), (8,))].to(model.device)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()  # the trunk's optimizer steps too
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.4f}", flush=True)

model.eval()
with torch.no_grad():  # no graph is kept, here or there
    print(f"first row now: loss {model(input_ids=rows[:1].to(model.device), labels=rows[:1].to(model.device)).loss.item():.4f}")
model.close()
