"""A conversation with the run's model: a line is a turn, the answer comes word by word. What was said stays on this machine.

python examples/chat.py --trunk JOIN --identity me.key --model MODEL
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers import AutoTokenizer, TextStreamer

from client_ends import SplitModelForCausalLM

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--trunk", required=True, help="the join string")
parser.add_argument("--identity", required=True, help="your key file")
parser.add_argument("--model", required=True)
parser.add_argument("--max-new-tokens", type=int, default=200)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = SplitModelForCausalLM.from_pretrained(args.model, trunk=args.trunk, identity=args.identity).eval().requires_grad_(False)
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

messages: list[dict[str, str]] = []
said = torch.empty(1, 0, dtype=torch.long)  # all tokens so far, of which the trunk keeps keys and values: only new ones travel
cache = model.make_cache()

for line in sys.stdin:
    messages.append({"role": "user", "content": line.strip()})
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        if not torch.equal(ids[:, : said.shape[1]], said):
            cache = model.make_cache()  # the template tells otherwise what was said before
    else:
        new = tokenizer(line, add_special_tokens=not said.numel(), return_tensors="pt").input_ids
        ids = torch.cat([said, new], 1)
    said = model.generate(
        ids.to(model.device),
        attention_mask=torch.ones_like(ids).to(model.device),
        past_key_values=cache,
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
        streamer=streamer,
    ).cpu()
    answer = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    messages.append({"role": "assistant", "content": answer})
model.close()
