"""transformers' Trainer on a split model. To go on after a stop: the server with --resume, this with --resume too.

python examples/trainer.py --trunk JOIN --identity me.key --model MODEL --data notes.txt --out runs/me
"""

from __future__ import annotations

import argparse

from transformers import AutoTokenizer, Trainer, TrainingArguments

from client_ends import SplitModelForCausalLM, bind_trainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--trunk", required=True, help="the join string")
parser.add_argument("--identity", required=True, help="your key file")
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True, help="a text file; it never leaves this machine")
parser.add_argument("--out", required=True, help="where checkpoints go")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--length", type=int, default=128, help="tokens a row")
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
with open(args.data, encoding="utf-8") as file:
    ids = tokenizer(file.read(), verbose=False).input_ids
rows = [ids[begin : begin + args.length] for begin in range(0, len(ids) - args.length + 1, args.length)]
dataset = [{"input_ids": row, "labels": row} for row in rows]

model = SplitModelForCausalLM.from_pretrained(args.model, trunk=args.trunk, identity=args.identity)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=50,
        save_steps=50,
    ),
    train_dataset=dataset[4:],
    eval_dataset=dataset[:4],
)
bind_trainer(trainer)  # its checkpoints find the trunk's; it warns where its arguments differ from the run's
trainer.train(resume_from_checkpoint=args.resume)
print(trainer.evaluate())
model.close()
